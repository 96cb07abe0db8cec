// Attention of one token over the keys and values of its sequence, in fp32.

constexpr int kTokens = 4;   // scores at once
constexpr int kColumns = 4;  // vectors of the output at once
constexpr int kAhead = 6;    // tokens whose keys or values are fetched ahead of their use

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

// scores[t] = scale · query · keys[t] for `count` tokens, `stride` numbers apart.
template <int count>
INLINE void score(const float* query, const float* keys, int64_t stride, int64_t head_dim, float scale, float* scores) {
    Floats sums[count] = {};
    int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) {
        const Floats values = load(query + i);
#pragma GCC unroll 4
        for (int t = 0; t < count; ++t) {
            const float* numbers = keys + t * stride + i;
            __builtin_prefetch(numbers + kAhead * stride);
            sums[t] += values * load(numbers);
        }
    }
    if (i < head_dim) {
        const Floats values = load_part(query + i, head_dim - i);
        for (int t = 0; t < count; ++t) sums[t] += values * load_part(keys + t * stride + i, head_dim - i);
    }
    for (int t = 0; t < count; ++t) scores[t] = scale * total(sums[t]);
}

// scores (length,) -> exp(scores - their largest), in place; returns their sum. Written in whole vectors.
INLINE float exponentials(float* scores, int64_t length) {
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
        const Floats powers = exponential(load(scores + t) - largest);
        memcpy(scores + t, &powers, sizeof powers);
        sums += powers;
    }
    if (whole == length) return total(sums);
    const Floats powers = exponential(load_part(scores + whole, length - whole) - largest);
    memcpy(scores + whole, &powers, sizeof powers);
    return total(sums + load_part(scores + whole, length - whole));
}

// out = sum over tokens of weights[t] · values[t] · factor, for `count` neighbouring vectors of it.
template <int count>
INLINE void average(const float* weights, const float* values, int64_t length, int64_t stride, float factor,
                    float* out) {
    Floats sums[count] = {};
    for (int64_t t = 0; t < length; ++t) {
#pragma GCC unroll 4
        for (int c = 0; c < count; ++c) {
            const float* numbers = values + t * stride + c * kLanes;
            __builtin_prefetch(numbers + kAhead * stride);
            sums[c] += weights[t] * load(numbers);
        }
    }
    for (int c = 0; c < count; ++c) sums[c] *= factor;
    memcpy(out, sums, sizeof sums);
}

// One query head over `length` tokens, their keys and values `stride` numbers apart; weights has room for whole vectors.
static void attend(const float* query, const float* keys, const float* values, int64_t length, int64_t stride,
                   int64_t head_dim, float scale, float* weights, float* out) {
    int64_t t = 0;
    for (; t + kTokens <= length; t += kTokens)
        score<kTokens>(query, keys + t * stride, stride, head_dim, scale, weights + t);
    for (; t < length; ++t) score<1>(query, keys + t * stride, stride, head_dim, scale, weights + t);
    const float factor = 1.0f / exponentials(weights, length);
    int64_t i = 0;
    for (; i + kColumns * kLanes <= head_dim; i += kColumns * kLanes)
        average<kColumns>(weights, values + i, length, stride, factor, out + i);
    for (; i + kLanes <= head_dim; i += kLanes) average<1>(weights, values + i, length, stride, factor, out + i);
    for (; i < head_dim; ++i) {
        float sum = 0.0f;
        for (int64_t token = 0; token < length; ++token) sum += weights[token] * values[token * stride + i];
        out[i] = sum * factor;
    }
}
