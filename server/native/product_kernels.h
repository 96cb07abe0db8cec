// The products of one or a few rows with a narrow matrix, summed in fp32 in the same order whatever else is computed. The
// matrix' rows lie `stride` numbers apart, and those that are needed next, and fetched meanwhile, `ahead` of those in use.
// Rows that share a matrix go through it together, so that what was loaded is used by all of them.

constexpr int kMostRows = 4;  // at once

// Dot products at once, and vectors of an output row: as many independent sums as hide the latency of one and fit the
// registers, of which the widest vectors have twice as many.
constexpr int dots_at_once(int rows) { return VECTOR_BYTES == 64 ? (rows > 2 ? 4 : 8) : (rows > 2 ? 2 : 8 / rows); }
constexpr int vectors_at_once(int rows) { return VECTOR_BYTES == 64 || rows == 1 ? 4 : 2; }

// u[row][j] = x[row] · A[j] for `count` neighbouring rows of A.
template <int rows, int count, class Number>
INLINE void dots(const float* const (&x)[rows], const Number* A, int64_t stride, int64_t ahead, int64_t d_in,
                 int64_t first, float* const (&u)[rows]) {
    Floats sums[rows][count] = {};
    int64_t i = 0;
    for (; i + kLanes <= d_in; i += kLanes) {
        Floats values[rows];
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) values[row] = load(x[row] + i);
#pragma GCC unroll 8
        for (int j = 0; j < count; ++j) {
            const Number* weights = A + j * stride + i;
            __builtin_prefetch(weights + ahead, 0, 2);
            const Floats numbers = load(weights);
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) sums[row][j] += values[row] * numbers;
        }
    }
    if (i < d_in) {
        for (int row = 0; row < rows; ++row) {
            const Floats values = load_part(x[row] + i, d_in - i);
            for (int j = 0; j < count; ++j) sums[row][j] += values * load_part(A + j * stride + i, d_in - i);
        }
    }
    for (int row = 0; row < rows; ++row)
        for (int j = 0; j < count; ++j) u[row][first + j] = total(sums[row][j]);
}

// x (rows, d_in) -> u (rows, width), with A (width, d_in).
template <int rows, class Number>
INLINE void shrink(const float* const (&x)[rows], const Number* A, int64_t stride, int64_t ahead, int64_t d_in,
                   int64_t width, float* const (&u)[rows]) {
    constexpr int kDots = dots_at_once(rows);
    int64_t j = 0;
    for (; j + kDots <= width; j += kDots) dots<rows, kDots>(x, A + j * stride, stride, ahead, d_in, j, u);
    for (; j < width; ++j) dots<rows, 1>(x, A + j * stride, stride, ahead, d_in, j, u);
}

// y += u B for `count` neighbouring vectors of each row of y.
template <int rows, int count, class Number>
INLINE void add_columns(const float* const (&u)[rows], const Number* B, int64_t stride, int64_t ahead, int64_t rank,
                        int64_t column, float* const (&y)[rows]) {
    Floats sums[rows][count];
    for (int row = 0; row < rows; ++row)
        for (int c = 0; c < count; ++c) sums[row][c] = load(y[row] + column + c * kLanes);
    for (int64_t j = 0; j < rank; ++j) {
        Floats numbers[count];
#pragma GCC unroll 4
        for (int c = 0; c < count; ++c) {
            const Number* weights = B + j * stride + column + c * kLanes;
            __builtin_prefetch(weights + ahead, 0, 2);
            numbers[c] = load(weights);
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
            for (int c = 0; c < count; ++c) sums[row][c] += u[row][j] * numbers[c];
    }
    for (int row = 0; row < rows; ++row) memcpy(y[row] + column, sums[row], sizeof sums[row]);
}

// y (rows, d_out) += u (rows, rank) B (rank, d_out).
template <int rows, class Number>
INLINE void expand(const float* const (&u)[rows], const Number* B, int64_t stride, int64_t ahead, int64_t rank,
                   int64_t d_out, float* const (&y)[rows]) {
    constexpr int kVectors = vectors_at_once(rows);
    int64_t column = 0;
    for (; column + kVectors * kLanes <= d_out; column += kVectors * kLanes)
        add_columns<rows, kVectors>(u, B, stride, ahead, rank, column, y);
    for (; column + kLanes <= d_out; column += kLanes) add_columns<rows, 1>(u, B, stride, ahead, rank, column, y);
    const int64_t rest = d_out - column;
    if (rest == 0) return;
    for (int row = 0; row < rows; ++row) {
        Floats sums = load_part(y[row] + column, rest);
        for (int64_t j = 0; j < rank; ++j) sums += u[row][j] * load_part(B + j * stride + column, rest);
        memcpy(y[row] + column, &sums, rest * sizeof(float));
    }
}
