// The products of one row with its slot's tables.
//
// Tables hold fp32 or fp16 numbers, and each of them is used once a row: what counts is how fast they come from memory.
// So while a row is computed, those of the next one are fetched. Everything is summed in fp32. A row's sums are made in
// the same order whatever else is in the batch.

template <class Number>
INLINE void add_typed(const Linear& linear, int64_t slot, int64_t next_slot, const float* x, bool has_hidden, float* u,
                      float* y) {
    const int64_t size_A = linear.width * linear.d_in, size_B = linear.rank * linear.d_out;
    const int64_t ahead = next_slot - slot;
    const Number* A = static_cast<const Number*>(linear.A) + slot * size_A;
    const Number* B = static_cast<const Number*>(linear.B) + slot * size_B;
    if (!has_hidden) shrink(x, A, linear.d_in, ahead * size_A, linear.d_in, linear.width, u);
    expand(u + linear.first, B, linear.d_out, ahead * size_B, linear.rank, linear.d_out, y);
}

static void add_row(const Linear& linear, int64_t slot, int64_t next_slot, const float* x, bool has_hidden, float* u,
                    float* y) {
    if (linear.is_half)
        add_typed<Half>(linear, slot, next_slot, x, has_hidden, u, y);
    else
        add_typed<float>(linear, slot, next_slot, x, has_hidden, u, y);
}
