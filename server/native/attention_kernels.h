// Attention of one token over the keys and values of its sequence, in fp32.

constexpr int kAhead = 8;  // tokens whose keys or values are fetched ahead of their use

// exp(x) for x <= 0, within 2e-7 of it. With n = round(x / ln 2) and r = x - n ln 2, exp(x) = 2^n exp(r), and exp(r) is
// its Taylor series to the seventh power: |r| <= 0.35, so what follows is below 6e-9.
INLINE Floats exponential(Floats x) {
    const Floats least = Floats{} - 87.0f;
    x = x < least ? least : x;  // not the other way round: NaN must stay NaN
    constexpr float kRound = 0x1.8p23f;
    const Floats n = (x * 1.44269504f + kRound) - kRound;
    // ln 2 in two parts, the first short enough that its product with n is exact
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats series = Floats{} + 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    Floats scale;
    memcpy(&scale, &power, sizeof scale);
    return series * scale;
}

// scores (length,) -> exp(scale · (scores - their largest)), in place; returns their sum. Written in whole vectors.
INLINE float exponentials(float* scores, float scale, int64_t length) {
    const int64_t whole = length / kLanes * kLanes;
    Floats most = Floats{} - __builtin_inff();
    for (int64_t t = 0; t < whole; t += kLanes) {
        const Floats values = load(scores + t);
        most = values > most ? values : most;
    }
    float largest = -__builtin_inff();
    for (int64_t lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    for (int64_t t = whole; t < length; ++t) largest = scores[t] > largest ? scores[t] : largest;
    Floats sums = {};
    for (int64_t t = 0; t < whole; t += kLanes) {
        const Floats powers = exponential((load(scores + t) - largest) * scale);
        memcpy(scores + t, &powers, sizeof powers);
        sums += powers;
    }
    if (whole == length) return total(sums);
    const Floats powers = exponential((load_part(scores + whole, length - whole) - largest) * scale);
    memcpy(scores + whole, &powers, sizeof powers);
    return total(sums + load_part(scores + whole, length - whole));
}

// Query heads, `query_stride` numbers apart, over `length` tokens, whose keys and values of one head are `stride` numbers
// apart -> out (heads, head_dim). weights (heads, weights_stride) has room for whole vectors, and scale is above 0.
template <int heads>
INLINE void attend_few(const float* query, int64_t query_stride, const float* keys, const float* values, int64_t length,
                       int64_t stride, int64_t head_dim, float scale, float* weights, int64_t weights_stride, float* out) {
    const float* queries[heads];
    const float* shares[heads];
    float* scores[heads];
    float* outs[heads];
    for (int head = 0; head < heads; ++head) {
        queries[head] = query + head * query_stride;
        shares[head] = scores[head] = weights + head * weights_stride;
        outs[head] = out + head * head_dim;
    }
    shrink<heads>(queries, keys, stride, kAhead * stride, head_dim, length, scores);
    float sums[heads];
    for (int head = 0; head < heads; ++head) sums[head] = exponentials(scores[head], scale, length);
    for (int64_t i = 0; i < heads * head_dim; ++i) out[i] = 0.0f;
    expand<heads>(shares, values, stride, kAhead * stride, length, head_dim, outs);
    for (int head = 0; head < heads; ++head)
        for (int64_t i = 0; i < head_dim; ++i) outs[head][i] /= sums[head];
}

// For 1 … kMostRows query heads of one head of keys and values.
static void attend(int64_t heads, const float* query, int64_t query_stride, const float* keys, const float* values,
                   int64_t length, int64_t stride, int64_t head_dim, float scale, float* weights, int64_t weights_stride,
                   float* out) {
    switch (heads) {
        case 1:
            return attend_few<1>(query, query_stride, keys, values, length, stride, head_dim, scale, weights,
                                 weights_stride, out);
        case 2:
            return attend_few<2>(query, query_stride, keys, values, length, stride, head_dim, scale, weights,
                                 weights_stride, out);
        case 3:
            return attend_few<3>(query, query_stride, keys, values, length, stride, head_dim, scale, weights,
                                 weights_stride, out);
        default:
            return attend_few<4>(query, query_stride, keys, values, length, stride, head_dim, scale, weights,
                                 weights_stride, out);
    }
}
