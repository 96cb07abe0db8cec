// The products of one row with its slot's tables.
//
// Tables hold fp32 or fp16 numbers, and each of them is used once a row: what counts is how fast they come from memory.
// So while a row is computed, those of the next one are fetched. Everything is summed in fp32. A row's sums are made in
// the same order whatever else is in the batch.

constexpr int kDots = 8;    // dot products at once: as many independent sums as hide the latency of one
constexpr int kBlocks = 4;  // vectors of an output row at once

// u[j] = x · A[j] for `count` neighbouring rows of A. The numbers of the row that follows lie `ahead` of these.
template <int count, class Number>
INLINE void dots(const float* x, const Number* A, int64_t ahead, int64_t d_in, float* u) {
    Floats sums[count] = {};
    int64_t i = 0;
    for (; i + kLanes <= d_in; i += kLanes) {
        const Floats values = load(x + i);
#pragma GCC unroll 8
        for (int j = 0; j < count; ++j) {
            const Number* weights = A + j * d_in + i;
            __builtin_prefetch(weights + ahead, 0, 2);
            sums[j] += values * load(weights);
        }
    }
    if (i < d_in) {
        const Floats values = load_part(x + i, d_in - i);
        for (int j = 0; j < count; ++j) sums[j] += values * load_part(A + j * d_in + i, d_in - i);
    }
    for (int j = 0; j < count; ++j) u[j] = total(sums[j]);
}

// x (d_in,) -> u (width,), with A (width, d_in).
template <class Number>
static void shrink(const float* x, const Number* A, int64_t ahead, int64_t d_in, int64_t width, float* u) {
    int64_t j = 0;
    for (; j + kDots <= width; j += kDots) dots<kDots>(x, A + j * d_in, ahead, d_in, u + j);
    for (; j < width; ++j) dots<1>(x, A + j * d_in, ahead, d_in, u + j);
}

// y += u B for `count` neighbouring vectors of y, with B's rows d_out apart.
template <int count, class Number>
INLINE void add_columns(const float* u, const Number* B, int64_t ahead, int64_t rank, int64_t d_out, float* y) {
    Floats sums[count];
    for (int c = 0; c < count; ++c) sums[c] = load(y + c * kLanes);
    for (int64_t j = 0; j < rank; ++j) {
#pragma GCC unroll 4
        for (int c = 0; c < count; ++c) {
            const Number* weights = B + j * d_out + c * kLanes;
            __builtin_prefetch(weights + ahead, 0, 2);
            sums[c] += u[j] * load(weights);
        }
    }
    memcpy(y, sums, sizeof sums);
}

// y (d_out,) += u (rank,) B (rank, d_out).
template <class Number>
static void expand(const float* u, const Number* B, int64_t ahead, int64_t rank, int64_t d_out, float* y) {
    int64_t column = 0;
    for (; column + kBlocks * kLanes <= d_out; column += kBlocks * kLanes)
        add_columns<kBlocks>(u, B + column, ahead, rank, d_out, y + column);
    for (; column + kLanes <= d_out; column += kLanes) add_columns<1>(u, B + column, ahead, rank, d_out, y + column);
    const int64_t rest = d_out - column;
    if (rest == 0) return;
    Floats sums = load_part(y + column, rest);
    for (int64_t j = 0; j < rank; ++j) sums += u[j] * load_part(B + j * d_out + column, rest);
    memcpy(y + column, &sums, rest * sizeof(float));
}

template <class Number>
INLINE void add_typed(const Linear& linear, int64_t slot, int64_t next_slot, const float* x, bool has_hidden, float* u,
                      float* y) {
    const int64_t size_A = linear.width * linear.d_in, size_B = linear.rank * linear.d_out;
    const int64_t ahead = next_slot - slot;
    const Number* A = static_cast<const Number*>(linear.A) + slot * size_A;
    const Number* B = static_cast<const Number*>(linear.B) + slot * size_B;
    if (!has_hidden) shrink(x, A, ahead * size_A, linear.d_in, linear.width, u);
    expand(u + linear.first, B, ahead * size_B, linear.rank, linear.d_out, y);
}

static void add_row(const Linear& linear, int64_t slot, int64_t next_slot, const float* x, bool has_hidden, float* u,
                    float* y) {
    if (linear.is_half)
        add_typed<Half>(linear, slot, next_slot, x, has_hidden, u, y);
    else
        add_typed<float>(linear, slot, next_slot, x, has_hidden, u, y);
}
