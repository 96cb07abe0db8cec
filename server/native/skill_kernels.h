// Rows times the mixtures of an inventory's skills that their routings make, by matrix tiles (AMX) of bf16 numbers.
//
// The skills are bf16 numbers. An fp32 number of a row goes through the products as the sum of two bf16 numbers, which
// leaves out at most 2^-18 of it; sums are in fp32. A row's result does not depend on the other rows.

constexpr int64_t kDepth = 32;          // bf16 numbers in a row of a tile
constexpr int64_t kTogether = 2;        // tiles of rows that go through the skills before these leave the nearest cache
constexpr int64_t kRowsTogether = kTogether * kTile;
constexpr int64_t kColumns = 4;         // tiles of sums at once: as many as hide how long one product takes
constexpr int64_t kMostInputs = 32;     // tiles of one head's inputs
constexpr int64_t kMostOwners = 16;     // tiles of the numbers of all skills

struct alignas(64) Tile {
    uint16_t numbers[kTile][kDepth];
};

struct alignas(64) TileSums {
    float numbers[kTile][kTile];
};

// The larger part of fp32 numbers, which a bf16 number holds.
INLINE __m512 round_to_bf16(__m512 values) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// 32 numbers -> a row of the tile with their larger parts, and of the one with what is left of them.
INLINE void split(__m512 first, __m512 second, uint16_t* large, uint16_t* small) {
    const __m512 large_first = round_to_bf16(first), large_second = round_to_bf16(second);
    const __m512bh own = _mm512_cvtne2ps_pbh(large_second, large_first);
    const __m512bh rest = _mm512_cvtne2ps_pbh(_mm512_sub_ps(second, large_second), _mm512_sub_ps(first, large_first));
    memcpy(large, &own, sizeof own);
    memcpy(small, &rest, sizeof rest);
}

INLINE int64_t tiles_for(int64_t numbers, int64_t size) { return (numbers + size - 1) / size; }

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= kTile ? 0xffff : count > 0 ? static_cast<__mmask16>((1u << count) - 1) : 0;
}

INLINE __m512i lane_numbers() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

// Rows of `count` numbers, `stride` apart -> tiles (2, steps): of the larger parts, and of the rest.
INLINE void split_rows(const float* values, int64_t stride, int64_t rows, int64_t count, int64_t steps, Tile* tiles) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t step = 0; step < steps; ++step) {
            const float* own = values + row * stride + step * kDepth;
            const int64_t left = count - step * kDepth;
            split(_mm512_maskz_loadu_ps(first_lanes(left), own),
                  _mm512_maskz_loadu_ps(first_lanes(left - kTile), own + kTile), tiles[step].numbers[row],
                  tiles[steps + step].numbers[row]);
        }
}

// Neighbouring tiles of skills.
struct Tiles {
    const uint16_t* first;
    int64_t columns;  // tiles side by side
    int64_t steps;    // tiles of the depth

    int64_t numbers() const { return columns * steps * kTile * kDepth; }
};

// Brings tiles nearer while others are worked on, an even part of them each of the `times` that `go_on` is called: a
// processor waits when it is asked for many at once.
class Fetch {
  public:
    Fetch(const Tiles& tiles, int64_t times)
        : line_(tiles.first), end_(tiles.first + tiles.numbers()), each_(tiles_for(tiles.numbers() / kDepth, times)) {}

    __attribute__((always_inline)) void go_on() {
        for (int64_t count = 0; count < each_ && line_ < end_; ++count, line_ += kDepth) __builtin_prefetch(line_);
    }

  private:
    const uint16_t* line_;
    const uint16_t* end_;
    int64_t each_;  // lines at a time
};

// Adds to the sums in one tile, with another for the skills; the instructions want their numbers as they are.
#define ADD_PRODUCTS(sum, own)                                                          \
    if (sum < count) {                                                                  \
        next.go_on();                                                                   \
        _tile_loadd(own, skills + (sum * steps + step) * kTile * kDepth, kTileBytes);   \
        _tile_dpbf16ps(sum, 6, own);                                                    \
        _tile_dpbf16ps(sum, 7, own);                                                    \
    }

// The sums of rows (2, steps) with 1 … kColumns neighbouring tiles of columns (count, steps).
INLINE void multiply_tiles(const Tile* rows, const uint16_t* skills, int64_t count, int64_t steps, Fetch& next,
                           TileSums* sums) {
    write_out();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(6, rows[step].numbers, kTileBytes);
        _tile_loadd(7, rows[steps + step].numbers, kTileBytes);
        ADD_PRODUCTS(0, 4)
        ADD_PRODUCTS(1, 5)
        ADD_PRODUCTS(2, 4)
        ADD_PRODUCTS(3, 5)
    }
    _tile_stored(0, sums[0].numbers, kTileBytes);
    if (count > 1) _tile_stored(1, sums[1].numbers, kTileBytes);
    if (count > 2) _tile_stored(2, sums[2].numbers, kTileBytes);
    if (count > 3) _tile_stored(3, sums[3].numbers, kTileBytes);
}
#undef ADD_PRODUCTS

// What unit `unit` of (heads, linears) multiplies inputs with.
INLINE Tiles shrinking(const Skills& skills, int64_t unit) {
    Tiles tiles{nullptr, tiles_for(skills.skills * skills.rank, kTile), tiles_for(skills.d_in / skills.heads, kDepth)};
    tiles.first = skills.linears[unit % skills.count].A + unit / skills.count * tiles.numbers();
    return tiles;
}

// What unit `unit` of (linears, heads) multiplies mixtures with.
INLINE Tiles expanding(const Skills& skills, int64_t unit) {
    const SkillLinear& linear = skills.linears[unit / skills.heads];
    Tiles tiles{nullptr, tiles_for(linear.d_out / skills.heads, kTile), tiles_for(skills.skills * skills.rank, kDepth)};
    tiles.first = linear.B + unit % skills.heads * tiles.numbers();
    return tiles;
}

// Columns are numbered (skill, rank number).
struct Owners {
    __m512i of[kMostOwners];  // the skills of a tile's columns
    __mmask16 skills;

    explicit Owners(const Skills& inventory) : skills(static_cast<__mmask16>((1u << inventory.skills) - 1)) {
        const __m128i shift = _mm_cvtsi32_si128(__builtin_ctzll(inventory.rank));
        for (int64_t tile = 0; tile < kMostOwners; ++tile) {
            const __m512i columns = _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(static_cast<int>(tile * kTile)));
            of[tile] = _mm512_srl_epi32(columns, shift);
        }
    }

    __attribute__((always_inline)) __m512 load(const float* weights) const {
        return _mm512_maskz_loadu_ps(skills, weights);
    }
    __attribute__((always_inline)) __m512 spread(__m512 weights, int64_t tile) const {
        return _mm512_permutexvar_ps(of[tile], weights);
    }
};

INLINE const float* weights_of(const SkillLinear& linear, const Skills& skills, int64_t slot, int64_t head) {
    return linear.weights + slot * skills.slot_stride + head * skills.skills;
}

// What one head's inputs (2, steps) of up to 16 rows give with each skill of a linear, mixed by the rows' weights ->
// mixed (rows, 16), of which the numbers `rank` apart are yet to be added.
INLINE void shrink_tile(const Skills& skills, const SkillLinear& linear, const Owners& owners, int64_t head,
                        const Tile* inputs, const Tiles& A, const int64_t* slots, int64_t rows, Fetch& next,
                        float* mixed) {
    TileSums sums[kColumns];
    for (int64_t tile = 0; tile < A.columns; tile += kColumns) {
        const int64_t count = A.columns - tile < kColumns ? A.columns - tile : kColumns;
        multiply_tiles(inputs, A.first + tile * A.steps * kTile * kDepth, count, A.steps, next, sums);
        for (int64_t row = 0; row < rows; ++row) {
            next.go_on();
            if (slots[row] < 0) continue;
            const __m512 weights = owners.load(weights_of(linear, skills, slots[row], head));
            __m512 sum = tile > 0 ? _mm512_load_ps(mixed + row * kTile) : _mm512_setzero_ps();
            for (int64_t each = 0; each < count; ++each)
                sum = _mm512_fmadd_ps(_mm512_load_ps(sums[each].numbers[row]), owners.spread(weights, tile + each), sum);
            _mm512_store_ps(mixed + row * kTile, sum);
        }
    }
}

// Units first … last-1 of (heads, linears): x (rows, d_in) -> u (linears, heads, kRowsTogether, 16).
static void shrink_skills(const Skills& skills, int64_t first, int64_t last, const float* x, const int64_t* slots,
                          int64_t rows, float* u) {
    const int64_t width = skills.d_in / skills.heads;
    const Owners owners(skills);
    Tile inputs[kTogether][2 * kMostInputs];
    for (int64_t unit = first; unit < last; ++unit) {
        const int64_t head = unit / skills.count, linear = unit % skills.count;
        const Tiles A = shrinking(skills, unit);
        Fetch next(unit + 1 < last ? shrinking(skills, unit + 1) : expanding(skills, first),
                   tiles_for(rows, kTile) * A.columns * A.steps + rows);
        for (int64_t row = 0; row < rows; row += kTile) {
            const int64_t count = rows - row < kTile ? rows - row : kTile;
            Tile* own = inputs[row / kTile];
            if (unit == first || linear == 0)
                split_rows(x + row * skills.d_in + head * width, skills.d_in, count, width, A.steps, own);
            shrink_tile(skills, skills.linears[linear], owners, head, own, A, slots + row, count, next,
                        u + ((linear * skills.heads + head) * kRowsTogether + row) * kTile);
        }
    }
}

// One linear's u (heads, kRowsTogether, 16) of a row -> the sum over heads and skills, `rank` numbers again and again.
INLINE __m512 fold_heads(const Skills& skills, const float* u) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t head = 0; head < skills.heads; ++head)
        sum = _mm512_add_ps(sum, _mm512_load_ps(u + head * kRowsTogether * kTile));
    for (int64_t apart = skills.rank; apart < kTile; apart *= 2) {
        const __m512i others = _mm512_xor_si512(lane_numbers(), _mm512_set1_epi32(static_cast<int>(apart)));
        sum = _mm512_add_ps(sum, _mm512_permutexvar_ps(others, sum));
    }
    return _mm512_mul_ps(sum, _mm512_set1_ps(skills.scaling));
}

// The mixtures of up to 16 rows: their low-rank numbers times the weights of a head, for all skills (2, steps).
INLINE void weigh(const Skills& skills, const SkillLinear& linear, const Owners& owners, int64_t head,
                  const float* low_rank, const int64_t* slots, int64_t rows, int64_t steps, Fetch& next, Tile* tiles) {
    for (int64_t row = 0; row < rows; ++row) {
        next.go_on();
        if (slots[row] < 0) continue;
        const __m512 weights = owners.load(weights_of(linear, skills, slots[row], head));
        const __m512 own = _mm512_load_ps(low_rank + row * kTile);
        for (int64_t step = 0; step < steps; ++step)
            split(_mm512_mul_ps(own, owners.spread(weights, 2 * step)),
                  _mm512_mul_ps(own, owners.spread(weights, 2 * step + 1)), tiles[step].numbers[row],
                  tiles[steps + step].numbers[row]);
    }
}

// Adds to one head's columns of y (rows, width), `stride` apart, what the rows' mixtures (2, steps) make.
INLINE void expand_tile(const Tiles& B, const Tile* mixtures, int64_t width, const int64_t* slots, int64_t rows,
                        Fetch& next, float* y, int64_t stride) {
    TileSums sums[kColumns];
    for (int64_t tile = 0; tile < B.columns; tile += kColumns) {
        const int64_t count = B.columns - tile < kColumns ? B.columns - tile : kColumns;
        multiply_tiles(mixtures, B.first + tile * B.steps * kTile * kDepth, count, B.steps, next, sums);
        for (int64_t row = 0; row < rows; ++row) {
            next.go_on();
            if (slots[row] < 0) continue;
            for (int64_t each = 0; each < count; ++each) {
                const int64_t column = (tile + each) * kTile;
                const __mmask16 mask = first_lanes(width - column);
                float* out = y + row * stride + column;
                const __m512 before = _mm512_maskz_loadu_ps(mask, out);
                _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(before, _mm512_load_ps(sums[each].numbers[row])));
            }
        }
    }
}

// Units first … last-1 of (linears, heads): adds to y (rows, …), `stride` apart, what u makes of it.
static void expand_skills(const Skills& skills, int64_t first, int64_t last, const float* u, const int64_t* slots,
                          int64_t rows, float* y, int64_t stride) {
    const Owners owners(skills);
    alignas(64) float low_rank[kRowsTogether * kTile];
    Tile mixtures[kMostOwners];
    for (int64_t unit = first; unit < last; ++unit) {
        const int64_t head = unit % skills.heads;
        const SkillLinear& linear = skills.linears[unit / skills.heads];
        const int64_t width = linear.d_out / skills.heads;
        const Tiles B = expanding(skills, unit);
        Fetch next(unit + 1 < last ? expanding(skills, unit + 1) : Tiles{},
                   tiles_for(rows, kTile) * B.columns * B.steps + 2 * rows);
        if (unit == first || head == 0)
            for (int64_t row = 0; row < rows; ++row)
                if (slots[row] >= 0)
                    _mm512_store_ps(low_rank + row * kTile,
                                    fold_heads(skills, u + ((unit - head) * kRowsTogether + row) * kTile));
        for (int64_t row = 0; row < rows; row += kTile) {
            const int64_t count = rows - row < kTile ? rows - row : kTile;
            weigh(skills, linear, owners, head, low_rank + row * kTile, slots + row, count, B.steps, next, mixtures);
            expand_tile(B, mixtures, width, slots + row, count, next, y + row * stride + linear.column + head * width,
                        stride);
        }
    }
}
