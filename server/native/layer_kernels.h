// What stands between the products of a layer, row by row, in fp32.

// states += more, where there is more, and normed = weight · states / sqrt(mean(states²) + epsilon); of (d,) each.
static void norm_row(float* states, const float* more, const float* weight, float epsilon, int64_t d, float* normed) {
    if (more != nullptr)
        for (int64_t i = 0; i < d; ++i) states[i] += more[i];
    Floats squares = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        const Floats values = load(states + i);
        squares += values * values;
    }
    if (i < d) {
        const Floats values = load_part(states + i, d - i);
        squares += values * values;
    }
    const float scale = 1.0f / __builtin_sqrtf(total(squares) / d + epsilon);
    for (i = 0; i < d; ++i) normed[i] = weight[i] * (states[i] * scale);
}

// Rotates `heads` neighbouring heads x (heads, head_dim), with cosines and sines (head_dim,) of the row's position: each
// number of a head's first half with the one in the same place of its second half.
static void rotate_row(float* x, const float* cosines, const float* sines, int64_t heads, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t head = 0; head < heads; ++head) {
        float* first = x + head * head_dim;
        float* second = first + half;
        for (int64_t i = 0; i < half; ++i) {
            const float a = first[i], b = second[i];
            first[i] = a * cosines[i] - b * sines[i];
            second[i] = b * cosines[half + i] + a * sines[half + i];
        }
    }
}

// x / (1 + exp(-x)), by an exponential that cannot overflow.
INLINE Floats silu(Floats x) {
    const Floats power = exponential(x < 0 ? x : -x);
    return x * (x < 0 ? power : Floats{} + 1.0f) / (power + 1.0f);
}

// out = silu(gate) · up, of (d,) each.
static void gate_row(const float* gate, const float* up, int64_t d, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        const Floats gated = silu(load(gate + i)) * load(up + i);
        memcpy(out + i, &gated, sizeof gated);
    }
    if (i == d) return;
    const Floats gated = silu(load_part(gate + i, d - i)) * load_part(up + i, d - i);
    memcpy(out + i, &gated, (d - i) * sizeof(float));
}
