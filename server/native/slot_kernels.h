// The products of rows with their slot's tables.
//
// Tables hold fp32 or fp16 numbers. In a batch of many tasks each of them is used once: what counts is how fast they come
// from memory, so while a row is computed, those of the next one are fetched. Rows of one prompt use the same tables, and
// go through them together. Everything is summed in fp32, and a row's sums are made in the same order whatever else is in
// the batch.

template <int rows, class Number>
INLINE void add_typed(const Linear& linear, int64_t slot, int64_t next_slot, const float* x, float* room, float* y,
                      int64_t stride) {
    const int64_t d_in = linear.d_in, rank = linear.rank, ahead = next_slot - slot;
    const int64_t size_A = linear.width * d_in, size_B = rank * linear.d_out;
    const Number* A = static_cast<const Number*>(linear.A) + slot * size_A + linear.first * d_in;
    const Number* B = static_cast<const Number*>(linear.B) + slot * size_B;
    const float* inputs[rows];
    const float* low_rank[rows];
    float* shrunk[rows];
    float* outputs[rows];
    for (int row = 0; row < rows; ++row) {
        inputs[row] = x + row * d_in;
        low_rank[row] = shrunk[row] = room + row * rank;
        outputs[row] = y + row * stride + linear.column;
    }
    shrink<rows>(inputs, A, d_in, ahead * size_A, d_in, rank, shrunk);
    expand<rows>(low_rank, B, linear.d_out, ahead * size_B, rank, linear.d_out, outputs);
}

template <int rows>
INLINE void add_few(const Linear& linear, int64_t slot, int64_t next_slot, const float* x, float* room, float* y,
                    int64_t stride) {
    if (linear.is_half)
        add_typed<rows, Half>(linear, slot, next_slot, x, room, y, stride);
    else
        add_typed<rows, float>(linear, slot, next_slot, x, room, y, stride);
}

// For 1 … kMostRows neighbouring rows of one slot; room has rank numbers for each.
static void add_rows(const Linear& linear, int64_t slot, int64_t next_slot, int64_t rows, const float* x, float* room,
                     float* y, int64_t stride) {
    switch (rows) {
        case 1: return add_few<1>(linear, slot, next_slot, x, room, y, stride);
        case 2: return add_few<2>(linear, slot, next_slot, x, room, y, stride);
        case 3: return add_few<3>(linear, slot, next_slot, x, room, y, stride);
        default: return add_few<4>(linear, slot, next_slot, x, room, y, stride);
    }
}
