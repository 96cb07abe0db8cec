// What stands before and behind an 8-bit product: activations into two digits, and the digits' products into one. The
// letters and the numbers are those of server/engine/int8_digits.py, whose torch version gives the same digits.

constexpr float kLargest = 127.0f;
constexpr float kBase = 254.0f;
constexpr float kSmallest = 1e-30f;

// The nearest whole number, the even one of two; for less than 2^22.
INLINE Floats nearest(Floats x) {
    constexpr float kRound = 0x1.8p23f;
    return (x + kRound) - kRound;
}

typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4)));

// Whole numbers -127 … 127 with the offset that makes them unsigned.
INLINE Bytes unsign(Floats whole) {
    return __builtin_convertvector(__builtin_convertvector(whole, Integers) + 128, Bytes);
}

INLINE Words magnitude(Floats values) {
    Words bits;
    memcpy(&bits, &values, sizeof bits);
    return bits & 0x7fffffff;
}

// The magnitude of the number in x (d,) that is the farthest from 0; NaN where one of them is NaN.
INLINE float largest_magnitude(const float* x, int64_t d) {
    Words most = {};  // magnitudes as whole numbers, among which NaN is the largest
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        const Words bits = magnitude(load(x + i));
        most = bits > most ? bits : most;
    }
    if (i < d) {
        const Words bits = magnitude(load_part(x + i, d - i));
        most = bits > most ? bits : most;
    }
    uint32_t bits = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) bits = most[lane] > bits ? most[lane] : bits;
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    return largest;
}

// A whole vector of steps -> first digits, and what they leave in the steps' place.
INLINE Bytes first_digits(Floats steps, Floats* rest) {
    const Floats whole = nearest(steps);
    *rest = (steps - whole) * kBase;
    return unsign(whole);
}

// x (d,) -> its digits (d,) and (d,), and its scale. `steps` (d,) is room to work in: with products kept there, no
// compiler joins them with the sums that follow into operations that round once less.
static void quantise_row(const float* x, int64_t d, float* steps, uint8_t* first, uint8_t* second, float* scale) {
    const float largest = largest_magnitude(x, d);
    *scale = (largest < kSmallest ? kSmallest : largest) * (1.0f / kLargest);
    const float reciprocal = 1.0f / *scale;
    for (int64_t i = 0; i < d; ++i) steps[i] = x[i] * reciprocal;
    Floats rest;
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        const Bytes digits = first_digits(load(steps + i), &rest);
        memcpy(first + i, &digits, sizeof digits);
        memcpy(steps + i, &rest, sizeof rest);
    }
    if (i < d) {
        const Bytes digits = first_digits(load_part(steps + i, d - i), &rest);
        memcpy(first + i, &digits, d - i);
        memcpy(steps + i, &rest, (d - i) * sizeof(float));
    }
    for (i = 0; i + kLanes <= d; i += kLanes) {
        const Bytes digits = unsign(nearest(load(steps + i)));
        memcpy(second + i, &digits, sizeof digits);
    }
    if (i < d) {
        const Bytes digits = unsign(nearest(load_part(steps + i, d - i)));
        memcpy(second + i, &digits, d - i);
    }
}

// y = (products + others / 254) · scale, of (d,) each.
static void join_row(const float* products, const float* others, float scale, int64_t d, float* y) {
    for (int64_t i = 0; i < d; ++i) y[i] = (products[i] + others[i] * (1.0f / kBase)) * scale;
}
