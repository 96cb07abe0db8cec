// Products with 8-bit weights by the matrix tiles of the processor (AMX): 16 rows of 64 bytes each. The numbers are those
// of server/engine/int8_product.py, whose plain product gives the same.

constexpr int64_t kTile = 16;                           // rows of a tile, and columns of its sums
constexpr int64_t kTileBytes = 64;                      // of a row of a tile
constexpr int64_t kPair = 2 * kTile;                    // channels computed at once
constexpr int64_t kPairBytes = 2 * kTile * kTileBytes;  // of their weights for 64 numbers of a row
constexpr int64_t kFetched = 4096;                      // bytes that weights are fetched ahead of their use

// What `ldtilecfg` reads: the same shape for all eight tiles.
struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC does not know that loading a tile reads memory: whatever was computed for it is to be written before.
INLINE void write_out() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Sums {
    int32_t numbers[2][2][kTile][kTile];  // of a digit, half of a pair, row and channel
};

// The sums of 16 rows of both digits, `stride` bytes a row, with a pair of channels.
INLINE void add_up(const uint8_t* first, const uint8_t* second, int64_t stride, const int8_t* weights, int64_t steps,
                   Sums* sums) {
    write_out();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, weights += kPairBytes) {
#pragma GCC unroll 32
        for (int64_t line = 0; line < kPairBytes; line += 64) __builtin_prefetch(weights + kFetched + line);
        _tile_loadd(4, first + step * kTileBytes, stride);
        _tile_loadd(5, second + step * kTileBytes, stride);
        _tile_loadd(6, weights, kTileBytes);
        _tile_loadd(7, weights + kPairBytes / 2, kTileBytes);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums->numbers[0][0], kTileBytes);
    _tile_stored(1, sums->numbers[0][1], kTileBytes);
    _tile_stored(2, sums->numbers[1][0], kTileBytes);
    _tile_stored(3, sums->numbers[1][1], kTileBytes);
}

// y = what the sums of one row with `count` channels stand for, as `join_row` has it.
INLINE void join_sums(const int32_t* first, const int32_t* second, const int32_t* offsets, const float* scales,
                      float row_scale, int64_t count, float* y) {
    for (int64_t c = 0; c < count; ++c) {
        const float product = static_cast<float>(first[c] - offsets[c]) * scales[c];
        const float other = static_cast<float>(second[c] - offsets[c]) * scales[c];
        y[c] = (product + other * (1.0f / kBase)) * row_scale;
    }
}

// Digits (2, rows, d_in), rounded up to whole tiles, and scales of rows -> the columns of y (rows, d_out) that belong to
// the pair of channels from `channel` on.
INLINE void multiply_pair(const Int8Weight& weight, int64_t channel, const uint8_t* digits, const float* row_scales,
                          int64_t rows, float* y) {
    const int64_t steps = (weight.d_in + kTileBytes - 1) / kTileBytes, stride = steps * kTileBytes;
    const int64_t second = (rows + kTile - 1) / kTile * kTile * stride;
    Sums sums;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t place = row % kTile;
        if (place == 0)
            add_up(digits + row * stride, digits + second + row * stride, stride, weight.pairs + channel * stride, steps,
                   &sums);
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t own = channel + half * kTile, left = weight.d_out - own;
            if (left >= kTile)
                join_sums(sums.numbers[0][half][place], sums.numbers[1][half][place], weight.offsets + own,
                          weight.scales + own, row_scales[row], kTile, y + row * weight.d_out + own);
            else
                join_sums(sums.numbers[0][half][place], sums.numbers[1][half][place], weight.offsets + own,
                          weight.scales + own, row_scales[row], left, y + row * weight.d_out + own);
        }
    }
}

static void open_tiles() {
    static constexpr TileShapes kShapes;
    _tile_loadconfig(&kShapes);
}

// Or the operating system would keep the tiles for this thread whenever another one runs.
static void close_tiles() { _tile_release(); }

// The same for pairs first … last-1.
static void multiply_pairs(const Int8Weight& weight, int64_t first, int64_t last, const uint8_t* digits,
                           const float* row_scales, int64_t rows, float* y) {
    open_tiles();
    for (int64_t pair = first; pair < last; ++pair) multiply_pair(weight, pair * kPair, digits, row_scales, rows, y);
    close_tiles();
}
