// The products of one row with a narrow matrix, summed in fp32 in the same order whatever else is computed. The matrix'
// rows lie `stride` numbers apart, and those that are needed next, and fetched meanwhile, `ahead` of those in use.

constexpr int kDots = 8;    // dot products at once: as many independent sums as hide the latency of one
constexpr int kBlocks = 4;  // vectors of an output row at once

// u[j] = x · A[j] for `count` neighbouring rows of A.
template <int count, class Number>
INLINE void dots(const float* x, const Number* A, int64_t stride, int64_t ahead, int64_t d_in, float* u) {
    Floats sums[count] = {};
    int64_t i = 0;
    for (; i + kLanes <= d_in; i += kLanes) {
        const Floats values = load(x + i);
#pragma GCC unroll 8
        for (int j = 0; j < count; ++j) {
            const Number* weights = A + j * stride + i;
            __builtin_prefetch(weights + ahead, 0, 2);
            sums[j] += values * load(weights);
        }
    }
    if (i < d_in) {
        const Floats values = load_part(x + i, d_in - i);
        for (int j = 0; j < count; ++j) sums[j] += values * load_part(A + j * stride + i, d_in - i);
    }
    for (int j = 0; j < count; ++j) u[j] = total(sums[j]);
}

// x (d_in,) -> u (width,), with A (width, d_in).
template <class Number>
static void shrink(const float* x, const Number* A, int64_t stride, int64_t ahead, int64_t d_in, int64_t width,
                   float* u) {
    int64_t j = 0;
    for (; j + kDots <= width; j += kDots) dots<kDots>(x, A + j * stride, stride, ahead, d_in, u + j);
    for (; j < width; ++j) dots<1>(x, A + j * stride, stride, ahead, d_in, u + j);
}

// y += u B for `count` neighbouring vectors of y.
template <int count, class Number>
INLINE void add_columns(const float* u, const Number* B, int64_t stride, int64_t ahead, int64_t rank, float* y) {
    Floats sums[count];
    for (int c = 0; c < count; ++c) sums[c] = load(y + c * kLanes);
    for (int64_t j = 0; j < rank; ++j) {
#pragma GCC unroll 4
        for (int c = 0; c < count; ++c) {
            const Number* weights = B + j * stride + c * kLanes;
            __builtin_prefetch(weights + ahead, 0, 2);
            sums[c] += u[j] * load(weights);
        }
    }
    memcpy(y, sums, sizeof sums);
}

// y (d_out,) += u (rank,) B (rank, d_out).
template <class Number>
static void expand(const float* u, const Number* B, int64_t stride, int64_t ahead, int64_t rank, int64_t d_out,
                   float* y) {
    int64_t column = 0;
    for (; column + kBlocks * kLanes <= d_out; column += kBlocks * kLanes)
        add_columns<kBlocks>(u, B + column, stride, ahead, rank, y + column);
    for (; column + kLanes <= d_out; column += kLanes) add_columns<1>(u, B + column, stride, ahead, rank, y + column);
    const int64_t rest = d_out - column;
    if (rest == 0) return;
    Floats sums = load_part(y + column, rest);
    for (int64_t j = 0; j < rank; ++j) sums += u[j] * load_part(B + j * stride + column, rest);
    memcpy(y + column, &sums, rest * sizeof(float));
}
