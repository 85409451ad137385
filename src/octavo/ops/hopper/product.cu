// Grouped product of token rows with FP8 expert weights on Hopper's tensor cores, for every stage of an expert MLP.
//
//     out[row, f] = sum_c  act[source(row), c] * W_e(row)[f, c]        f: features, c: contraction
//
// The weight is the left operand of wgmma (features are its 64 rows), so that a tile takes BN tokens, any multiple
// of 32, and a weight tile is read and widened once for all of them. E4M3 rows with a scale per slab are the left
// operand themselves (TOKENS_LEFT). A thread block is one producer warpgroup (the weight by TMA, rows gathered by
// cp.async) and two or three consumer warpgroups; blocks are persistent and walk the tiles of all experts.
//
// Compile-time modes (macros):
//   WIDE   1: bfloat16 activations; E4M3 weights are widened in registers.  0: E4M3 by E4M3.
//   BANK   1: with WIDE, the weights are bfloat16 already (a chunk of experts, dequantized; the columns of every 16 with
//             the even ones first), and no register sees them.
//   FLIP   0: f over the weight's rows, c over its columns.  1: f over columns, c over rows (the input gradient), the
//             tile is turned in registers.
//   SCALE  how the weight's scales are applied: see below.
//   BN     tokens of a tile, a multiple of 32.
//   COLUMNS of a multiplication: BN, or 128 features with TOKENS_LEFT.
//   CONSUMERS  warpgroups that multiply: 2, or 3 of 64 tokens each.
//   STAGE  STORE: out [M, F].  SWIGLU: z = [gate, up] [M, 2F] and h [M, F].  GRADIENT: dz [M, 2F] from z and the
//             product dh, and each row's share of <dh, h>.
//   OUTER  1: with GRADIENT and at most 16 ranks, also the tile's part of the gradient of LoRA's A: p * h times the row
//             of x·A, summed over its tokens. h is in registers here, and in memory nowhere.
//   PEAKS  1: with GRADIENT, also each row's largest |dz * fold|, by parts as the shares: dz is rounded with one scale a
//             row, and would be read once more to find it.
//   EVERY_LANE 1: all lanes of a warp say that a slot is free, not one for all: tools that look for races follow lanes.
//
// A thread owns features 2g and 2g + 1 of each 16 (g = lane / 4) and tokens 8j + 2q + {0, 1} (q = lane % 4): wgmma's
// rows g and g + 8, by the order in which the tensor map lays a tile's rows in shared memory. With SWIGLU the first
// product has gates and the second ups. With TOKENS_LEFT it owns tokens g and g + 8 of each 16 and features 8q .. 8q + 7
// of each 32, 16 bytes of a result.

// `instructions.cuh` comes before.

enum { STORE = 0, SWIGLU = 1, GRADIENT = 2 };
// NONE: folded into the activations, or one. COLUMN: one scale per feature, after the sum. TABLE: a factor per
// contraction index (FLIP) or per slab, rounded with the weight to bfloat16 (two terms, so the weight is rounded once).
// SLAB: E4M3 by E4M3 with a scale per 128 of the contraction: of the weight, and without FLIP of the
// activations too (with FLIP these have one scale a row).
enum { NONE = 0, COLUMN = 1, TABLE = 2, SLAB = 3 };

constexpr int BF = 256;               // features of a tile, of all consumers (SWIGLU: half of them gates)
constexpr int BC = BANK ? 64 : 128;   // contraction of a step
constexpr int KS = BC / 16;           // bfloat16 multiplications of a step
constexpr int A_BYTES = BF * BC * (BANK ? 2 : 1);
constexpr int B_BYTES = WIDE ? BN * BC * 2 : BN * BC;
constexpr int TABLE_BYTES = 1024;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + TABLE_BYTES;
constexpr int MAX_EXPERTS = 1024;
constexpr int SHARED_BYTES = 232448;  // what a block may have
constexpr int RECORDS = 8;            // of tiles that the producer has begun: more than there are stages
constexpr int LIST = (BN / 16 + 3) & ~3;   // words of a thread's rows in a tile's list
constexpr int SHARES = STAGE == GRADIENT ? CONSUMERS * 4 * BN : 0;   // one of each warp and token
constexpr int OTHER_BYTES =
    1024 + 128 + RECORDS * 32 + LIST * 16 * 8 + (1 + PEAKS) * SHARES * 4 + 4 * (MAX_EXPERTS + 1);
constexpr int STAGES_FIT = (SHARED_BYTES - OTHER_BYTES) / STAGE_BYTES;
constexpr int STAGES = STAGES_FIT > 6 ? 6 : STAGES_FIT;
static_assert(STAGES < RECORDS, "");
constexpr bool DUAL = STAGE == SWIGLU;
// Whether tokens are wgmma's rows, so that a thread's sums are of two tokens: a factor for each token and slab is two
// reads of shared memory then, and would be as many as the tensor cores' own where tokens are columns.
constexpr bool TOKENS_LEFT = SCALE == SLAB && !FLIP;
// Of the consumers so many share a tile's features, each all tokens, or with TOKENS_LEFT 64 of them.
constexpr int FEATURE_CONSUMERS = TOKENS_LEFT ? CONSUMERS / (BN / 64) : CONSUMERS;
constexpr int MT = BF / FEATURE_CONSUMERS / (TOKENS_LEFT ? COLUMNS : 64);   // multiplications of a consumer side by side
constexpr int SUMS = COLUMNS / 2;                                           // of each, in a thread
static_assert(COLUMNS == (TOKENS_LEFT ? 128 : BN) && MT >= 1, "");
static_assert(TOKENS_LEFT || MT == 2, "");
constexpr int TILE_F = DUAL ? BF / 2 : BF;
constexpr int HOLD = BN > 128 ? 2 : 4;   // widened operands in flight
constexpr bool DRAINS = !WIDE && (FLIP || SCALE == SLAB);   // whether a step leaves nothing in flight
constexpr bool EARLY = FLIP || SCALE != TABLE;   // WIDE: whether a step's first words come before the last one has ended
constexpr int LORA_RANKS = BC / 2;    // of a step
constexpr int ZT = 32;                // tokens of a step that brings z
constexpr int RANKS = 16;             // OUTER: of its sums
constexpr u32 Z_BYTES = ZT * BF * 4;  // of a step: z, and after it rows of RANKS numbers

struct __align__(64) Params {
    u64 map[16];   // CUtensorMap of the weight
    const u8* act;
    const long long* token;
    const int* offsets;
    const float* act_scale;
    const float* scales;
    const u8* xa;
    const u8* factor;
    u16* out;
    u16* h;
    const u16* z;
    const void* p;
    float* shares;
    float* sums;           // OUTER: [token tiles, F, 16]
    const float* fold;     // PEAKS: [E, 2F]; with SLAB nothing is folded
    float* peaks;          // PEAKS: as shares
    long long num_rows;
    int E, F, C, w_rows, w_cols, part_rows, grid_n, grid_k, sb_n, sb_k, act_groups, R;
    int p_float, follows;   // follows: experts before the first have rows, up to offsets[-1]
    u32 sb_n_magic, sb_k_magic;
    int grid_rows;         // of an expert's parts together
    int one_box;           // FLIP: whether one box has all of a tile's features
    u32 pad[14];
};

// ---------------------------------------------------------------- words and descriptors

// A matrix descriptor is made of two words, of which the high one is the same for all: 128-byte swizzle, 8 rows per
// 1024 bytes, contraction contiguous.
__device__ __forceinline__ u32 descriptor(u32 address) { return (1u << 16) | ((address & 0x3FFFF) >> 4); }
__device__ __forceinline__ u64 whole(u32 low) { return 0x4000004000000000ull | low; }
// of LoRA's step: rows of LORA_RANKS numbers, 128 or 64 bytes
__device__ __forceinline__ u64 whole_lora(u32 low) { return (BC == 128 ? 0x4000004000000000ull : 0x8000002000000000ull) | low; }
__device__ __forceinline__ u32 lora_at(u32 row, u32 chunk) {
    return BC == 128 ? row * 128 + ((chunk ^ (row & 7)) * 16) : row * 64 + ((chunk ^ ((row >> 1) & 3)) * 16);
}
__device__ __forceinline__ u32 pick(u32 a, u32 b, u32 how) { return __byte_perm(a, b, how); }
__device__ __forceinline__ u16 to_bf16(float x) { return (u16)(pack_bf16(x, 0.f) & 0xFFFF); }
__device__ __forceinline__ float low_bf16(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_bf16(u32 v) { return __uint_as_float(v & 0xFFFF0000u); }
// With E4M3 activations, a thousand times coarser, one hyperbolic tangent; else an exponential and a reciprocal.
__device__ __forceinline__ float sigmoid(float x) {
    if (WIDE) return reciprocal_approx(1.f + exp2_approx(x * -1.4426950408889634f));
    return fmaf(0.5f, tanh_approx(0.5f * x), 0.5f);
}

// ---------------------------------------------------------------- E4M3 to bfloat16

// Four codes to two pairs: bytes 0, 2 and bytes 1, 3. The bits of an E4M3 number are those of a bfloat16 that is
// 2^-120 times as large, subnormals included; the factor comes with the scale. (NaN codes are refused at load.)
__device__ __forceinline__ void widen(u32 codes, u32& even, u32& odd) {
    odd = (codes & 0x80008000u) | ((codes >> 4) & 0x07F007F0u);
    even = ((codes << 8) & 0x80008000u) | ((codes << 4) & 0x07F007F0u);
}
// Rows of a product that is not flipped come 2^60 times as large (so do the activations h that it stores), which keeps
// their products with bare bits, 2^-60 of the true ones, far from the end of float32.
constexpr float ROWS_UP = 0x1p60f, ROWS_DOWN = 0x1p-60f;
constexpr float TABLE_UP = 0x1p104f;      // a table's factor: leaves room for scales up to 2^23
constexpr float TABLE_DOWN = FLIP ? 65536.f : 65536.f * ROWS_DOWN;   // what is left of 2^120

__device__ __forceinline__ void split_scale(float s, u16& hi, u16& lo) {
    float v = s * TABLE_UP;
    hi = to_bf16(v);
    lo = to_bf16(v - __uint_as_float((u32)hi << 16));
}

// ---------------------------------------------------------------- tiles

struct Tile {
    int expert, row0, rows, feature0, index_f, index;   // index: of the token tile, over all experts
    // A record of 32 bytes, which the producer writes before a tile's first step and consumers read when that is there:
    // finding a tile would take them a thousand cycles. Its place is written again RECORDS tiles later, after a wait for
    // a slot that consumers freed in a later tile than this one.
    __device__ __forceinline__ void write(u32 to) const {
        sts128(to, expert, row0, rows, feature0);
        sts64(to + 16, index_f, index);
    }
    __device__ __forceinline__ void read(u32 from) {
        u32 x[4], y[2];
        lds128(from, x[0], x[1], x[2], x[3]);
        lds64(from + 16, y[0], y[1]);
        expert = x[0], row0 = x[1], rows = x[2], feature0 = x[3], index_f = y[0], index = y[1];
    }
};

__device__ __forceinline__ int first_row(const Params& p, int expert) {
    return expert || p.follows ? __ldg(p.offsets + expert - 1) : 0;
}

// n / d, of numbers below 2^24 without the hundred instructions of a division
__device__ __forceinline__ int quotient(int n, int d) {
    int q = (int)((float)n * reciprocal_approx((float)d));
    while (q * d > n) --q;
    while ((q + 1) * d <= n) ++q;
    return q;
}

struct Schedule {
    const Params& p;
    const int* before;   // token tiles before each expert, E + 1
    int E, num_f;
    __device__ __forceinline__ int total() const { return before[E] * num_f; }
    // Tile `id`, whose expert is none before `expert`: a warp looks at 32 at once.
    __device__ __forceinline__ Tile at(int id, int expert, int lane) const {
        for (int passed = 32; passed == 32; expert += passed) {
            int e = expert + lane;
            passed = __popc(__ballot_sync(0xFFFFFFFF, e < E && before[e + 1] * num_f <= id));
        }
        Tile t;
        t.expert = expert;
        int start = first_row(p, expert), end = __ldg(p.offsets + expert);
        int tiles = before[expert + 1] - before[expert];
        int local = id - before[expert] * num_f;
        t.index_f = quotient(local, tiles);
        int index = local - t.index_f * tiles;
        t.index = before[expert] + index;
        int per = (quotient(end - start + tiles - 1, tiles) + 7) & ~7;
        t.row0 = start + index * per;
        t.rows = min(per, end - t.row0);
        if (t.rows < 0) t.rows = 0;
        t.feature0 = t.index_f * TILE_F;
        return t;
    }
};

// n / d for n * d < 2^32, with ceil(2^32 / d)
__device__ __forceinline__ int divide(int n, int d, u32 magic) { return d == 1 ? n : (int)__umulhi((u32)n, magic); }

// where the scales of a weight's row begin, and which of them is a column's
__device__ __forceinline__ const float* scales_of_row(const Params& p, int expert, int row) {
    row = min(row, p.w_rows - 1);
    int grid_row = expert * p.grid_rows;
    while (row >= p.part_rows) { row -= p.part_rows; grid_row += p.grid_n; }
    return p.scales + (long long)(grid_row + divide(row, p.sb_n, p.sb_n_magic)) * p.grid_k;
}
__device__ __forceinline__ int scale_of_column(const Params& p, int column) {
    return min(divide(min(column, p.w_cols - 1), p.sb_k, p.sb_k_magic), p.grid_k - 1);
}
__device__ __forceinline__ float weight_scale(const Params& p, int expert, int row, int column) {
    return __ldg(scales_of_row(p, expert, row) + scale_of_column(p, column));
}

// ---------------------------------------------------------------- producer

__device__ __forceinline__ void load_weight(const Params& p, const Tile& t, int step, u32 to, u32 bar, int lane) {
    // the same in all lanes, which the compiler has to be told
    int expert = __shfl_sync(0xFFFFFFFF, t.expert, 0), feature0 = __shfl_sync(0xFFFFFFFF, t.feature0, 0);
    if (lane) return;
    barrier_expect(bar, A_BYTES);
    const void* map = p.map;
    constexpr int LINE = BANK ? 64 : 128;          // features of a line of a turned tile
    constexpr int GROUP = TOKENS_LEFT ? 32 : 16;   // of features whose lines are in another order than they
    if (FLIP) {
        // lines of BC contraction rows
        if (p.one_box) tensor4(to, map, bar, 0, step * BC, feature0 / LINE, expert);
        else
            for (int i = 0; i < BF / LINE; ++i)
                tensor3(to + i * (LINE * BC * (BANK ? 2 : 1)), map, bar, feature0 + i * LINE, step * BC, expert);
    } else if (DUAL) {
        // 64 gates and their ups
        for (int i = 0; i < 2; ++i)
            tensor5(to + i * (A_BYTES / 2), map, bar, step * BC, 0, 0, (feature0 + i * 64) / GROUP, expert * 2);
    } else {
        tensor4(to, map, bar, step * BC, 0, 0, (expert * p.w_rows + feature0) / GROUP);
    }
}

constexpr int SIZE = WIDE ? 2 : 1;
constexpr int ROWS = BN / 16;             // of a thread: 16 bytes of each 16th row
constexpr int LINES = (BN + 127) / 128;   // of a tile, a thread's own

// Where row r of a tile stands in its list: a thread's rows beside each other.
__device__ __forceinline__ int place_of(int r) { return (r & 15) * LIST + (r >> 4); }

struct Batch {
    u32 row[4];
    __device__ __forceinline__ void read(u32 list) { lds128(list, row[0], row[1], row[2], row[3]); }
};
// Rows of a step, from a thread's list; those past the tile repeat its first row, and nobody keeps their sums. Everything
// waits for this: each copy is one multiplication and the copy, four beside each other.
__device__ __forceinline__ void load_rows(const Params& p, Batch first_rows, u32 list, u32 to, int thread, u32 at_byte) {
    u32 row_bytes = p.C * SIZE, chunk = thread & 7, first = thread >> 3;
    at_byte += chunk * 16;
    to += first * 128 + ((chunk ^ (first & 7)) * 16);
    Batch batch[2] = {first_rows, first_rows};
#pragma unroll
    for (int i0 = 0; i0 < ROWS; i0 += 4) {
        // those of the next batch are on their way meanwhile
        Batch& now = batch[i0 / 4 % 2];
        if (i0 + 4 < ROWS) batch[(i0 / 4 + 1) % 2].read(list + (i0 + 4) * 4);
        // 128 bytes of a row beside each other
#pragma unroll
        for (int part = 0; part < BC * SIZE / 128; ++part) {
            bool inside = at_byte + part * 128 < row_bytes;
            u64 from = (u64)p.act + (inside ? at_byte + part * 128 : 0), at[4];
            settle(from);
#pragma unroll
            for (int i = 0; i < 4; ++i) at[i] = from + (u64)now.row[i] * row_bytes;
#pragma unroll
            for (int i = 0; i < 4; ++i) settle(at[i]);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i0 + i < ROWS) copy16(to + part * (BN * 128) + (i0 + i) * 2048, (const void*)at[i], inside);
        }
    }
}

// Of the weight's scales in a slab, for the first (i = 0) or the second half of the tile's features (SWIGLU: gates, ups),
// what stays the same in a tile: where those of the features' row begin, or with FLIP which column is theirs.
struct SlabScales {
    const float* row;
    int column;
    __device__ __forceinline__ void begin(const Params& p, const Tile& t, int i) {
        if (FLIP) column = scale_of_column(p, t.feature0 + i * 128);
        else row = scales_of_row(p, t.expert, t.feature0 + i * (DUAL ? p.F : 128));
    }
    __device__ __forceinline__ const float* at(const Params& p, const Tile& t, int step) const {
        if (FLIP) return scales_of_row(p, t.expert, step * BC) + column;
        return row + scale_of_column(p, step * BC);
    }
};

constexpr int SLAB_WEIGHTS = 1008;   // where a step's table has a slab's two scales of the weight, after those of tokens

// Scales of E4M3 activations and of slabs come like the rows, by copies that nobody waits for here: read through
// registers, their latency would be a step's. One scale a row comes with the last step.
__device__ __forceinline__ void load_scales(
    const Params& p, const Tile& t, int step, bool last, u32 to, int thread, const float* const (&own)[LINES],
    const SlabScales& slab
) {
    if (TOKENS_LEFT || last) {
        int group = TOKENS_LEFT ? min(divide(step * BC, p.sb_k, p.sb_k_magic), p.act_groups - 1) : 0;
#pragma unroll
        for (int i = 0; i < LINES; ++i)
            if (thread + i * 128 < BN) copy4(to + (thread + i * 128) * 4, own[i] + group);
    }
    // by another warp than that which asks for the weight
    if (SCALE == SLAB && thread >= 126) copy4(to + SLAB_WEIGHTS + (thread - 126) * 4, slab.at(p, t, step));
}

// what the scales of a step need, fetched a step ahead
struct Table {
    float ahead[2];
    int column[2];
    SlabScales slab;
    __device__ __forceinline__ void begin(const Params& p, const Tile& t, int thread) {
        if (WIDE && SCALE == TABLE && FLIP) {
#pragma unroll
            for (int i = 0; i < 2; ++i) column[i] = scale_of_column(p, t.feature0 + i * 128);
        } else if (SCALE == TABLE || SCALE == SLAB) {
            if (thread >= 126) slab.begin(p, t, thread - 126);
        }
        fetch(p, t, 0, thread);
    }
    __device__ __forceinline__ void fetch(const Params& p, const Tile& t, int step, int thread) {
        if (!WIDE || SCALE != TABLE) return;
        if (FLIP) {
            const float* scales = scales_of_row(p, t.expert, min(step * BC + (thread & (BC - 1)), p.C - 1));
#pragma unroll
            for (int i = 0; i < 2; ++i) ahead[i] = __ldg(scales + column[i]);
        } else if (thread >= 126) {
            ahead[0] = __ldg(slab.at(p, t, step));
        }
    }
    __device__ __forceinline__ void store(u32 to, int thread) const {
        if (!WIDE || SCALE != TABLE) return;
        u16 hi, lo;
        if (FLIP) {
            // per pair of contraction rows: {hi, hi}, {lo, lo}, for each 128 features
            if (thread < BC) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    split_scale(ahead[i], hi, lo);
                    u32 at = to + i * 512 + (thread >> 1) * 8 + (thread & 1) * 2;
                    sts16(at, hi);
                    sts16(at + 4, lo);
                }
            }
        } else if (thread >= 126) {
            split_scale(ahead[0], hi, lo);
            sts64(to + (thread - 126) * 8, (u32)hi << 16 | hi, (u32)lo << 16 | lo);
        }
    }
};

__device__ __forceinline__ void load_z(const Params& p, const Tile& t, int part, u32 to, u32 table, int thread) {
    // tokens part * ZT ..: [gates of BF, ups of BF] each, 32-byte granules turned by the token
    constexpr int CHUNKS = BF / 4;
    static_assert(CHUNKS == 64, "");
    int chunk = thread % CHUNKS, first = thread / CHUNKS, f = t.feature0 + chunk % (CHUNKS / 2) * 8;
    int rows = f < p.F ? t.rows - part * ZT - first : 0;
    u32 at = to + first * (BF * 4) + chunk * 16;
    const u16* from = p.z;
    if (rows > 0) from += (long long)(t.row0 + part * ZT + first) * (2 * p.F) + chunk / (CHUNKS / 2) * p.F + f;
#pragma unroll 4
    for (int i = 0; i < ZT / 2; ++i) {
        bool valid = 2 * i < rows;
        copy16((at ^ ((i & 3) * 32)) + i * (BF * 8), from, valid);
        if (2 * i + 2 < rows) from += 4 * p.F;
    }
    if (OUTER && thread < 2 * ZT) {
        int local = thread >> 1, row = part * ZT + local, first = (thread & 1) * 8;
        bool valid = row < t.rows && first < p.R;
        copy16(to + Z_BYTES + local * (RANKS * 2) + first * 2,
               p.xa + (valid ? ((long long)(t.row0 + row) * p.R + first) * 2 : 0), valid);
    }
    if (thread < ZT) {
        int row = part * ZT + thread;
        float v = 0.f;
        if (row < t.rows) {
            long long at = t.row0 + row;
            v = p.p_float ? ((const float*)p.p)[at] : __uint_as_float((u32)((const u16*)p.p)[at] << 16);
        }
        stsf(table + thread * 4, v);
    }
}

// Which of the weight's (or the output's) features lies in line r of a tile, and whether it is one.
__device__ __forceinline__ int feature_of(const Params& p, const Tile& t, int r, bool& inside) {
    int block = r >> 6, f = r & 48;
    if (TOKENS_LEFT) f = (r & 32) + (r & 7) * 4 + ((r >> 3) & 3);
    else f += (r & 7) * 2 + ((r >> 3) & 1);
    if (DUAL) {
        f += t.feature0 + (block >> 1) * 64;
        inside = f < p.F;
        return f + (block & 1) * p.F;
    }
    f += t.feature0 + block * 64;
    inside = f < p.F;
    return f;
}

// LORA_RANKS ranks of both of LoRA's operands: the factor where the weight's tile lies, x·A where rows lie
__device__ __forceinline__ void load_lora(const Params& p, const Tile& t, int part, u32 to, int thread) {
    int r0 = part * LORA_RANKS, ranks = min(p.R - r0, LORA_RANKS), chunks = ((ranks + 15) & ~15) / 8;
    int width = DUAL ? 2 * p.F : p.F;
    // 2, 4 or 8 threads for a line, and all of them zeros for its padding
    int shift = chunks > 4 ? 3 : chunks > 2 ? 2 : 1, chunk = thread & ((1 << shift) - 1);
    if (chunk >= chunks) return;
    bool there = chunk * 8 < ranks;
    u32 stride = p.R * 2;
    const u8* from = p.factor + (r0 + chunk * 8) * 2 + (long long)t.expert * width * stride;
    for (int r = thread >> shift; r < BF; r += 128 >> shift) {
        bool inside;
        int f = feature_of(p, t, r, inside);
        inside = inside && there;
        copy16(to + lora_at(r, chunk), inside ? from + (u64)(u32)f * stride : p.factor, inside);
    }
    to += A_BYTES;
    from = p.xa + (r0 + chunk * 8) * 2 + (long long)t.row0 * stride;
    for (int r = thread >> shift; r < BN; r += 128 >> shift) {
        bool inside = r < t.rows && there;
        copy16(to + lora_at(r, chunk), inside ? from + (u64)(u32)r * stride : p.xa, inside);
    }
}

__device__ __forceinline__ void produce(
    const Params& p, const Schedule& schedule, u32 stages, u32 full, u32 empty, u32 record, u32 lists, int thread
) {
    int main_steps = (p.C + BC - 1) / BC, lora_steps = (p.R + LORA_RANKS - 1) / LORA_RANKS;
    int warp = __shfl_sync(0xFFFFFFFF, thread >> 5, 0), total = __shfl_sync(0xFFFFFFFF, schedule.total(), 0);
    int slot = 0;
    u32 phase = 0;
    Table tables;
    // which rows a tile reads is fetched a tile ahead
    u32 coming[LINES];
    Tile next;
    next.expert = 0;
    auto look_ahead = [&](int id) {
        if (id >= total) return;
        next = schedule.at(id, next.expert, thread & 31);
#pragma unroll
        for (int i = 0; i < LINES; ++i) {
            int r = thread + i * 128;
            long long row = next.row0 + (r < next.rows ? r : 0);
            coming[i] = p.token ? (u32)__ldg(p.token + row) : (u32)row;
        }
    };
    auto acquire = [&] {
        barrier_wait(empty + slot * 8, phase ^ 1);
        return stages + slot * STAGE_BYTES;
    };
    auto pass_on = [&] {
        copy_arrive(full + slot * 8);
        barrier_arrive(full + slot * 8);
        if (++slot == STAGES) { slot = 0; phase ^= 1; }
    };
    look_ahead(blockIdx.x);
    for (int id = blockIdx.x, n = 0; id < total; id += gridDim.x, ++n) {
        Tile t = next;
        // two lists in turn: one that is written again was read by all before they met here in between
        u32 list = lists + (n & 1) * (LIST * 64);
        const float* own[LINES];
#pragma unroll
        for (int i = 0; i < LINES; ++i) {
            own[i] = p.act_scale + (u64)coming[i] * (u32)p.act_groups;
            if (thread + i * 128 < BN) sts32(list + place_of(thread + i * 128) * 4, coming[i]);
        }
        named_sync(1, 128);
        list += (thread >> 3) * (LIST * 4);
        tables.begin(p, t, thread);
        for (int step = 0; step < main_steps; ++step) {
            Batch rows;
            rows.read(list);
            u32 base = acquire(), table = base + A_BYTES + B_BYTES;
            if (step == 0 && thread == 127) t.write(record + n % RECORDS * 32);
            load_rows(p, rows, list, base + A_BYTES, thread, step * BC * SIZE);
            if (warp == 0) load_weight(p, t, step, base, full + slot * 8, thread);
            if (WIDE) {
                tables.store(table, thread);
                if (step + 1 < main_steps) tables.fetch(p, t, step + 1, thread);
            } else {
                load_scales(p, t, step, step + 1 == main_steps, table, thread, own, tables.slab);
            }
            pass_on();
            if (step == 0) look_ahead(id + gridDim.x);
        }
        for (int part = 0; part < lora_steps; ++part) {
            load_lora(p, t, part, acquire(), thread);
            pass_on();
        }
        for (int part = 0; part < (STAGE == GRADIENT ? BN / ZT : 0); ++part) {
            u32 base = acquire();
            load_z(p, t, part, base, base + A_BYTES + B_BYTES, thread);
            pass_on();
        }
    }
}

// ---------------------------------------------------------------- consumers

struct Ring {
    u32 stages, full, empty;
    int slot;
    u32 phase;
    // for what threads read themselves, and a slot that is waited for again
    __device__ __forceinline__ u32 look() const {
        barrier_wait(full + slot * 8, phase);
        return stages + slot * STAGE_BYTES;
    }
    __device__ __forceinline__ u32 wait() const {
        u32 base = look();
        // rows came by ordinary copies: the tensor cores read them, and the copy engine writes in their place next
        fence_async();
        return base;
    }
    __device__ __forceinline__ int next() {
        int was = slot;
        if (++slot == STAGES) { slot = 0; phase ^= 1; }
        return was;
    }
    __device__ __forceinline__ void free(int which, int lane) {
        __syncwarp();
        if (EVERY_LANE || lane == 0) barrier_arrive(empty + which * 8);
    }
};

// SLAB: sums in a slab's unit, its scales' product. They are multiplied by the ratio of two units before each slab, so
// that all are added in the tensor core, and no registers hold a slab's alone.
struct Units {
    static constexpr float SMALLEST = 0x1p-100f;   // of a unit
    // How far a unit falls at most from one slab to the next: both, and sums of 2^32 in a unit, stay inside of float32.
    static constexpr float TOKEN_FALLS = 0x1p-60f, WEIGHT_FALLS = 0x1p-34f;
    float token[2], weight[2];
    __device__ __forceinline__ void begin() {
        token[0] = token[1] = weight[0] = weight[1] = SMALLEST;
    }
    // The ratio of the unit so far and of the next one. What a slab adds that is smaller yet is lost beside the one before;
    // but zeros have a scale of 1, so a token's may fall far.
    static __device__ __forceinline__ float change(float& unit, float scale, float falls) {
        float next = fmaxf(scale, fmaxf(unit * falls, SMALLEST)), ratio = unit * reciprocal_approx(next);
        unit = next;
        return ratio;
    }
};

struct Work {
    float acc[MT][SUMS];

    // Where a step of bfloat16 activations reads, and what it has read ahead: words for two multiplications, non-flipped
    // {half 0, half 1} of chunks k and k + 1, flipped contraction rows 0 .. 7, 8 .. 15, 16 .. 23 and 24 .. 31; scales.
    struct Wide {
        u32 at[MT], table;
        u32 w[2][MT][4];
        u32 s[2][4], hi[2], lo[2];
        __device__ __forceinline__ void fetch(int pair) {
#pragma unroll
            for (int tile = 0; tile < MT; ++tile) {
                u32 (&x)[4] = w[pair & 1][tile];
                if (FLIP) matrix4_turned(at[tile] + pair * 4096, x[0], x[1], x[2], x[3]);
                else matrix4(at[tile] ^ (pair * 32), x[0], x[1], x[2], x[3]);
            }
        }
        __device__ __forceinline__ void fetch_scales(int k) {
            u32 (&y)[4] = s[k & 1];
            lds64(table + k * 64, y[0], y[1]);
            lds64(table + k * 64 + 32, y[2], y[3]);
        }
        // the first words of the slot at `base`
        __device__ __forceinline__ void begin(u32 base, int group, int warp, int lane) {
            table = base + A_BYTES + B_BYTES;
#pragma unroll
            for (int tile = 0; tile < MT; ++tile) {
                int block = group * MT + tile;
                if (FLIP) {
                    u32 chunk = (block & 1) * 4 + warp;
                    at[tile] = base + (block >> 1) * (128 * BC) + lane * 128 + ((chunk ^ (lane & 7)) * 16);
                } else {
                    u32 line = block * 64 + warp * 16 + ((lane >> 3) & 1) * 8 + (lane & 7);
                    at[tile] = base + line * BC + (((lane >> 4) ^ (lane & 7)) * 16);
                }
            }
            fetch(0);
            if (SCALE == TABLE) {
                if (FLIP) {
                    table += group * 512 + (lane & 3) * 8;
                    fetch_scales(0);
                } else {
                    // of gates and of ups, or of this consumer's features
                    lds64(table + (DUAL ? 0 : group) * 8, hi[0], lo[0]);
                    if (DUAL) lds64(table + 8, hi[1], lo[1]);
                }
            }
        }
    };

    // one step of bfloat16 activations, whose first words are there; its last multiplications are left in flight
    __device__ __forceinline__ void wide_step(u32 base, int group, Wide& ahead) {
        u32 b = descriptor(base + A_BYTES);
        u32 hold[HOLD][MT][4];
#pragma unroll
        for (int k = 0; k < KS; ++k) {
            if ((k & 1) == 0 && k + 2 < KS) ahead.fetch(k / 2 + 1);
            if (SCALE == TABLE && FLIP && k + 1 < KS) ahead.fetch_scales(k + 1);
            u32 (&a)[MT][4] = hold[k & (HOLD - 1)], (&y)[4] = ahead.s[k & 1];
#pragma unroll
            for (int tile = 0; tile < MT; ++tile) {
                u32 (&x)[4] = ahead.w[(k >> 1) & 1][tile];
                if (FLIP) {
                    widen(x[(k & 1) * 2], a[tile][0], a[tile][1]);
                    widen(x[(k & 1) * 2 + 1], a[tile][2], a[tile][3]);
                } else {
                    widen(x[(k & 1) * 2], a[tile][0], a[tile][2]);
                    widen(x[(k & 1) * 2 + 1], a[tile][1], a[tile][3]);
                }
#pragma unroll
                for (int i = 0; i < 4 && SCALE == TABLE; ++i) {
                    if (FLIP) a[tile][i] = fma_bf16(a[tile][i], y[i & 2], mul_bf16(a[tile][i], y[(i & 2) + 1]));
                    else {
                        int which = DUAL ? tile : 0;
                        a[tile][i] = fma_bf16(a[tile][i], ahead.hi[which], mul_bf16(a[tile][i], ahead.lo[which]));
                    }
                }
            }
            multiply(a, b, k);
        }
    }

    __device__ __forceinline__ void finish(Ring& ring, int slot, int lane) {
        mma_wait<0>();
        ring.free(slot, lane);
    }

    // one step of a dequantized weight
    __device__ __forceinline__ void bank_step(u32 base, int group, int lane, Ring& ring, int previous) {
        u32 a = descriptor(base + group * (A_BYTES / 2)), b = descriptor(base + A_BYTES);
        mma_fence();
#pragma unroll
        for (int k = 0; k < KS; ++k)
#pragma unroll
            for (int tile = 0; tile < MT; ++tile) {
                u32 left = a + tile * (128 * BC >> 4);
                // turned, 16 rows of the contraction are 2048 bytes
                if (FLIP) MMA::wide_ss_turned(acc[tile], whole(left + k * 128), whole(b + k * 2), 1);
                else MMA::wide_ss(acc[tile], whole(left + k * 2), whole(b + k * 2), 1);
            }
        mma_commit();
        mma_wait<1>();
        if (previous >= 0) ring.free(previous, lane);
    }

    __device__ __forceinline__ void multiply(u32 (&a)[MT][4], u32 b, int k) {
        u64 rows = whole(b + (k >> 2) * (BN * 128 >> 4) + (k & 3) * 2);
#pragma unroll
        for (int tile = 0; tile < MT; ++tile) settle(a[tile]);
        mma_fence();
#pragma unroll
        for (int tile = 0; tile < MT; ++tile)
            MMA::wide(acc[tile], a[tile][0], a[tile][1], a[tile][2], a[tile][3], rows, 1);
        mma_commit();
        if (k + 1 < KS) mma_wait<HOLD - 1>();
    }

    // E4M3 wgmma wants contraction rows 4q .. 4q + 3 of a feature in a word. ldmatrix gives a thread rows 2q and 2q + 1
    // of whatever 8 rows it is told, so it is told rows 0, 1, 4, 5, 10, 11, 14, 15 and then 2, 3, 6, 7, 8, 9, 12, 13:
    // of these no two are 8 apart, which would be in the same banks. So the two halves of a word come the other way
    // round to threads of q > 1.
    __device__ __forceinline__ static u32 turned_row(int lane) {
        int i = lane & 7, matrix = lane >> 3;
        return (matrix >> 1) * 16 + (i >> 1) * 4 + (i & 1) + ((matrix ^ (i >> 2)) & 1) * 2;
    }
    struct Turn {
        u32 even, odd;
        __device__ __forceinline__ explicit Turn(int lane)
            : even(lane & 2 ? 0x2064 : 0x6420), odd(lane & 2 ? 0x3175 : 0x7531) {}
        __device__ __forceinline__ void words(u32 (&a)[4]) const {
            u32 x0 = a[0], x1 = a[1], x2 = a[2], x3 = a[3];
            a[0] = pick(x0, x1, even);
            a[1] = pick(x0, x1, odd);
            a[2] = pick(x2, x3, even);
            a[3] = pick(x2, x3, odd);
        }
    };

    // E4M3 activations, turned words of the weight: one scale serves a row, or sums are in units.
    __device__ __forceinline__ void turned_step(u32 base, int group, int warp, int lane, Units& units) {
        u32 b = descriptor(base + A_BYTES), row = turned_row(lane), at = base + group * 16384 + row * 128;
        Turn turn(lane);
        // operands of two multiplications in flight, and the words of the next
        u32 hold[3][2][4];
        auto fetch = [&](int k) {
            u32 (&a)[2][4] = hold[k % 3];
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
                matrix4_turned(at + k * 4096 + (((4 * tile + warp) ^ (row & 7)) * 16),
                               a[tile][0], a[tile][1], a[tile][2], a[tile][3]);
        };
        fetch(0);
        if (SCALE == SLAB) {
            float scale = ldsf(base + A_BYTES + B_BYTES + SLAB_WEIGHTS + group * 4);
            float by = units.change(units.weight[0], scale, Units::WEIGHT_FALLS);
#pragma unroll
            for (int i = 0; i < MT * SUMS; ++i) acc[i / SUMS][i % SUMS] *= by;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            u32 (&a)[2][4] = hold[k % 3];
            if (k < 3) fetch(k + 1);
            turn.words(a[0]);
            turn.words(a[1]);
            settle(a[0]);
            settle(a[1]);
            mma_fence();
#pragma unroll
            for (int tile = 0; tile < MT; ++tile)
                MMA::narrow_rs(acc[tile], a[tile][0], a[tile][1], a[tile][2], a[tile][3], whole(b + k * 2), 1);
            mma_commit();
            if (k < 3) mma_wait<1>();
        }
        mma_wait<0>();
    }

    // E4M3 activations and weights as they are; their last multiplications are left in flight
    __device__ __forceinline__ void narrow_step(u32 base, int group, int lane, Ring& ring, int previous) {
        u32 a = descriptor(base + group * 16384), b = descriptor(base + A_BYTES);
        mma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int tile = 0; tile < MT; ++tile)
                MMA::narrow_ss(acc[tile], whole(a + tile * (8192 >> 4) + k * 2), whole(b + k * 2), 1);
        mma_commit();
        mma_wait<1>();
        if (previous >= 0) ring.free(previous, lane);
    }

    // The same with tokens from the left and a scale for each slab of both.
    __device__ __forceinline__ void tokens_step(u32 base, int group, int warp, int lane, Units& units) {
        u32 a = descriptor(base + A_BYTES + tokens_of(group) * 128), b = descriptor(base + part_of(group) * 16384);
        u32 table = base + A_BYTES + B_BYTES, scales = table + SLAB_WEIGHTS;
        float by[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            by[i] = 0.f;
            if (i == 0 || TWO_UNITS)
                by[i] = units.change(units.weight[i], ldsf(scales + (TWO_UNITS ? i : group % 2) * 4), Units::WEIGHT_FALLS);
        }
        table += (tokens_of(group) + warp * 16 + (lane >> 2)) * 4;
        float low = units.change(units.token[0], ldsf(table), Units::TOKEN_FALLS);
        float high = units.change(units.token[1], ldsf(table + 32), Units::TOKEN_FALLS);
        scale(low, high, by);
        mma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int part = 0; part < MT; ++part)
                MMA::narrow_ss(acc[part], whole(a + k * 2), whole(b + part * (16384 >> 4) + k * 2), 1);
        mma_commit();
        mma_wait<0>();
    }

    // TOKENS_LEFT: whether a consumer's features have two scales of the weight, those of gates and of ups or of each 128
    static constexpr bool TWO_UNITS = DUAL || FEATURE_CONSUMERS == 1;
    // the first of a consumer's tokens, and which part of the features is its own
    __device__ __forceinline__ static int tokens_of(int group) { return group / FEATURE_CONSUMERS * 64; }
    __device__ __forceinline__ static int part_of(int group) { return group % FEATURE_CONSUMERS; }

    // all sums, times a number for each token, g and g + 8, and one of the weight
    __device__ __forceinline__ void scale(float low, float high, const float (&weight)[2]) {
        float factor[2][2] = {{low * weight[0], high * weight[0]}, {low * weight[1], high * weight[1]}};
#pragma unroll
        for (int i = 0; i < MT * SUMS; ++i)
            // with gates and ups, 32 sums each
            acc[i / SUMS][i % SUMS] *= factor[!TWO_UNITS ? 0 : DUAL ? i / 32 % 2 : i / SUMS][i / 2 % 2];
    }

    __device__ __forceinline__ void run(
        const Params& p, const Tile& t, Ring& ring, int group, int warp, int lane, float* shares
    ) {
        int g = lane >> 2, q = lane & 3;
        // the first of this thread's features in product 0
        int f = t.feature0;
        if (TOKENS_LEFT) f += part_of(group) * (DUAL ? 64 : 128) + 8 * q;
        else f += group * 64 * (DUAL ? 1 : MT) + warp * 16 + 2 * g;
        float column[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            column[i] = 1.f;
            if (SCALE == COLUMN) {
                int tile = i >> 1, half = i & 1, row = f + half + tile * 64;
                if (DUAL) row = min(f, p.F - 1) + min(half, p.F - 1) + tile * p.F;
                column[i] = weight_scale(p, t.expert, row, 0) * (WIDE ? ROWS_UP : 1.f);
            }
        }
        int main_steps = (p.C + BC - 1) / BC;
        int previous = -1;
        u32 base = 0;
#pragma unroll
        for (int i = 0; i < MT * SUMS; ++i) acc[i / SUMS][i % SUMS] = 0.f;
        Wide ahead;
        Units units;
        units.begin();
        if (WIDE && !BANK) {
            base = ring.wait();
            ahead.begin(base, group, warp, lane);
        }
        for (int step = 0; step < main_steps; ++step) {
            if (WIDE && !BANK) {
                wide_step(base, group, ahead);
                previous = ring.next();
                // operands in flight any longer would make the compiler serialize every multiplication
                if (!EARLY) finish(ring, previous, lane);
                if (step + 1 < main_steps) {
                    base = ring.wait();
                    ahead.begin(base, group, warp, lane);
                }
                if (EARLY) finish(ring, previous, lane);
                continue;
            }
            base = ring.wait();
            // a slot whose table is needed after the sum is freed then
            if (BANK) bank_step(base, group, lane, ring, previous);
            else if (TOKENS_LEFT) tokens_step(base, group, warp, lane, units);
            else if (FLIP) turned_step(base, group, warp, lane, units);
            else narrow_step(base, group, lane, ring, previous);
            previous = ring.next();
            if (DRAINS && step + 1 < main_steps) ring.free(previous, lane);
        }
        mma_wait<0>();
        if (WIDE && SCALE == TABLE) {
#pragma unroll
            for (int i = 0; i < MT * SUMS; ++i) acc[i / SUMS][i % SUMS] *= TABLE_DOWN;
        }
        if (BANK && !FLIP) {
#pragma unroll
            for (int i = 0; i < MT * SUMS; ++i) acc[i / SUMS][i % SUMS] *= ROWS_DOWN;
        }
        if (TOKENS_LEFT) scale(units.token[0], units.token[1], units.weight);   // the last slab's unit
        else if (SCALE == COLUMN || !WIDE) {
            u32 table = base + A_BYTES + B_BYTES;
#pragma unroll
            for (int j = 0; j < BN / 8; ++j) {
                float s0 = 1.f, s1 = 1.f;
                if (!WIDE) lds_float2(table + (8 * j + 2 * q) * 4, s0, s1);
                if (SCALE == SLAB) s0 *= units.weight[0], s1 *= units.weight[0];
#pragma unroll
                for (int tile = 0; tile < MT; ++tile) {
                    acc[tile][4 * j] *= s0 * column[2 * tile];
                    acc[tile][4 * j + 1] *= s1 * column[2 * tile];
                    acc[tile][4 * j + 2] *= s0 * column[2 * tile + 1];
                    acc[tile][4 * j + 3] *= s1 * column[2 * tile + 1];
                }
            }
        }
        if (BANK || !WIDE) ring.free(previous, lane);
        for (int r0 = 0; r0 < p.R; r0 += LORA_RANKS) {
            base = ring.wait();
            // rows of LORA_RANKS numbers
            u32 features = base + (TOKENS_LEFT ? part_of(group) * 128 : group * MT * 64) * BC;
            u32 tokens = base + A_BYTES + (TOKENS_LEFT ? tokens_of(group) * BC : 0);
            u32 f = descriptor(features), n = descriptor(tokens);
            constexpr u32 NEXT = (TOKENS_LEFT ? 128 : 64) * BC >> 4;
            int steps = (min(p.R - r0, LORA_RANKS) + 15) / 16;
            for (int k = 0; k < steps; ++k) {
                mma_fence();
#pragma unroll
                for (int tile = 0; tile < MT; ++tile)
                    if (TOKENS_LEFT) MMA::wide_ss(acc[tile], whole_lora(n + k * 2), whole_lora(f + tile * NEXT + k * 2), 1);
                    else MMA::wide_ss(acc[tile], whole_lora(f + tile * NEXT + k * 2), whole_lora(n + k * 2), 1);
                mma_commit();
                mma_wait<0>();
            }
            ring.free(ring.next(), lane);
        }
        if (STAGE == GRADIENT) {
            gradient(p, t, ring, group, warp, lane, f, shares);
            return;
        }
        if (TOKENS_LEFT) {
            tokens_out(p, t, group, warp, lane, f);
            return;
        }
        if (DUAL) {
            swiglu(p, t, lane, f);
            return;
        }
        u16* to = p.out + (long long)(t.row0 + 2 * q) * p.F + f;
#pragma unroll
        for (int tile = 0; tile < MT; ++tile) {
            int live = f + tile * 64 < p.F ? t.rows - 2 * q : 0;
#pragma unroll
            for (int j = 0; j < BN / 8; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    store_if(to + (8 * j + i) * p.F + tile * 64,
                             pack_bf16(acc[tile][4 * j + i], acc[tile][4 * j + 2 + i]), 8 * j + i < live);
        }
    }

    // this thread's eight features of 32, the `number`-th of its consumer's, for token g or g + 8
    __device__ __forceinline__ void eight(int number, int half, u32 (&x)[4]) const {
        const float* sums = acc[number / 4] + number % 4 * 16 + 2 * half;
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = pack_bf16(sums[i % 2 * 8 + i / 2], sums[i % 2 * 8 + 4 + i / 2]);
    }

    __device__ __forceinline__ void tokens_out(const Params& p, const Tile& t, int group, int warp, int lane, int f) {
        int first = tokens_of(group) + warp * 16 + (lane >> 2);
        long long width = DUAL ? 2 * p.F : p.F;
        u16* to = p.out + (t.row0 + first) * width + f;
        u16* to_h = p.h + (long long)(t.row0 + first) * p.F + f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool live = first + half * 8 < t.rows;
            u16* line = to + half * 8 * width;
#pragma unroll
            for (int n = 0; n < MT * 128 / (DUAL ? 64 : 32); ++n) {
                // (a branch also keeps the compiler from packing all sums first, which no registers are left for)
                if (f + 32 * n >= p.F) break;
                u32 x[4];
                // of each 128 features 64 are gates
                eight(DUAL ? n / 2 * 4 + n % 2 : n, half, x);
                store4_if(line + 32 * n, x, live);
                if (!DUAL) continue;
                u32 up[4], h[4];
                eight(n / 2 * 4 + n % 2 + 2, half, up);
                store4_if(line + p.F + 32 * n, up, live);
                // from the rounded z, so that backward computes the same h again
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float low = low_bf16(x[i]), high = high_bf16(x[i]);
                    h[i] = pack_bf16(low * sigmoid(low) * low_bf16(up[i]), high * sigmoid(high) * high_bf16(up[i]));
                }
                store4_if(to_h + (long long)half * 8 * p.F + 32 * n, h, live);
            }
        }
    }

    __device__ __forceinline__ void swiglu(const Params& p, const Tile& t, int lane, int f) {
        int g = lane >> 2, first = 2 * (lane & 3);
        int live = f < p.F ? t.rows - first : 0;
        u16* to = p.out + (long long)(t.row0 + first) * (2 * p.F) + f;
        // h is stored as the next product reads it: even columns of each 16 first, then odd ones
        int where = WIDE ? (f & ~15) + (g & 1) * 8 + ((f & 15) >> 1) - (g & 1) : f;
        u16* to_h = p.h + (long long)(t.row0 + first) * p.F + where;
#pragma unroll
        for (int j = 0; j < BN / 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 gates = pack_bf16(acc[0][4 * j + i], acc[0][4 * j + 2 + i]);
                u32 ups = pack_bf16(acc[1][4 * j + i], acc[1][4 * j + 2 + i]);
                // from the rounded z, so that backward computes the same h again
                float gate[2] = {low_bf16(gates), high_bf16(gates)};
                u32 value = pack_bf16(gate[0] * sigmoid(gate[0]) * low_bf16(ups) * (WIDE ? ROWS_UP : 1.f),
                                      gate[1] * sigmoid(gate[1]) * high_bf16(ups) * (WIDE ? ROWS_UP : 1.f));
                if (WIDE) {
                    u32 other = __shfl_xor_sync(0xFFFFFFFF, value, 4);
                    value = g & 1 ? pick(other, value, 0x7632) : pick(value, other, 0x5410);
                }
                bool stored = 8 * j + i < live;
                u16* line = to + (8 * j + i) * (2 * p.F);
                store_if(line, gates, stored);
                store_if(line + p.F, ups, stored);
                store_if(to_h + (8 * j + i) * p.F, value, stored);
            }
    }

    __device__ __forceinline__ void gradient(
        const Params& p, const Tile& t, Ring& ring, int group, int warp, int lane, int f, float* shares
    ) {
        int g = lane >> 2, q = lane & 3;
        // tokens 2q and 2q + 1 of eight, then those of the next eight
        u16* line = p.out + (long long)(t.row0 + 2 * q) * (2 * p.F) + f;
        int live[MT];
#pragma unroll
        for (int tile = 0; tile < MT; ++tile) live[tile] = f + tile * 64 < p.F ? t.rows - 2 * q : 0;
        // the turn of a token's granules is a thread's own: (local >> 1) & 3 == q
        u32 at[MT];
#pragma unroll
        for (int tile = 0; tile < MT; ++tile)
            at[tile] = 2 * q * (BF * 4) + ((((group * MT + tile) * 4 + warp) ^ q) * 32) + g * 4;
        // of gates and of ups
        float fold[MT][2][2];
#pragma unroll
        for (int i = 0; i < MT * 4; ++i) {
            int tile = i >> 2, half = (i >> 1) & 1, part = i & 1, feature = f + tile * 64 + half;
            fold[tile][half][part] = !PEAKS || feature >= p.F ? 0.f
                                     : SCALE == SLAB      ? 1.f
                                     : __ldg(p.fold + (long long)t.expert * (2 * p.F) + part * p.F + feature);
        }
        float outer[MT][2][4];
#pragma unroll
        for (int i = 0; i < MT * 8; ++i) outer[i / 8][(i / 4) % 2][i % 4] = 0.f;
        // where this thread's rows of the four 8 by 8 blocks of x·A lie: tokens 0 .. 7 and 8 .. 15, ranks 0 .. 7, 8 .. 15
        u32 at_xa = Z_BYTES + (lane & 15) * (RANKS * 2) + (lane >> 4) * 16;
#pragma unroll
        for (int part = 0; part < BN / ZT; ++part) {
            u32 base = ring.wait(), table = base + A_BYTES + B_BYTES + 8 * q;
            float sums[8], tops[8];
            u32 left[MT][4];   // OUTER: a feature's tokens 2q and 2q + 1 of eight, then of the next eight
#pragma unroll
            for (int jj = 0; jj < ZT / 8; ++jj) {
                int j = part * (ZT / 8) + jj;
                float weight[2], h[2][MT][2];
                lds_float2(table + jj * 32, weight[0], weight[1]);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float share = 0.f, top = 0.f;
#pragma unroll
                    for (int tile = 0; tile < MT; ++tile) {
                        u32 from = base + at[tile] + (8 * jj + i) * (BF * 4);
                        u32 gates = lds32(from), ups = lds32(from + BF * 2);
                        float gate[2] = {low_bf16(gates), high_bf16(gates)}, up[2] = {low_bf16(ups), high_bf16(ups)};
                        float to_gate[2], to_up[2];
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            // past the last feature dh and z are zero
                            float dh = acc[tile][4 * j + 2 * half + i], s = sigmoid(gate[half]);
                            float silu = gate[half] * s;
                            h[i][tile][half] = silu * up[half];
                            share = fmaf(dh, h[i][tile][half], share);
                            dh *= weight[i];
                            to_gate[half] = dh * up[half] * (fmaf(-silu, s, silu) + s);
                            to_up[half] = dh * silu;
                        }
                        bool stored = 8 * j + i < live[tile];
                        u16* to = line + i * (2 * p.F) + tile * 64;
                        u32 dgates = pack_bf16(to_gate[0], to_gate[1]), dups = pack_bf16(to_up[0], to_up[1]);
                        store_if(to, dgates, stored);
                        store_if(to + p.F, dups, stored);
                        if (PEAKS) {
                            // as the rounding will read them
                            top = fmaxf(top, fabsf(low_bf16(dgates) * fold[tile][0][0]));
                            top = fmaxf(top, fabsf(high_bf16(dgates) * fold[tile][1][0]));
                            top = fmaxf(top, fabsf(low_bf16(dups) * fold[tile][0][1]));
                            top = fmaxf(top, fabsf(high_bf16(dups) * fold[tile][1][1]));
                        }
                    }
                    sums[2 * jj + i] = share;
                    tops[2 * jj + i] = top;
                }
                line += 16 * p.F;
                if (OUTER) {
#pragma unroll
                    for (int i = 0; i < 2 * MT; ++i)
                        left[i >> 1][(jj & 1) * 2 + (i & 1)] =
                            pack_bf16(h[0][i >> 1][i & 1] * weight[0], h[1][i >> 1][i & 1] * weight[1]);
                    if (jj & 1) {
                        u32 b[4];
                        matrix4_turned(base + at_xa + (jj >> 1) * (16 * RANKS * 2), b[0], b[1], b[2], b[3]);
#pragma unroll
                        for (int tile = 0; tile < MT; ++tile) {
                            warp_multiply(outer[tile][0], left[tile], b[0], b[1]);
                            warp_multiply(outer[tile][1], left[tile], b[2], b[3]);
                        }
                    }
                }
            }
            ring.free(ring.next(), lane);
            // eight sums over the eight lanes of a column: each lane ends with one
#pragma unroll
            for (int width = 4; width >= 1; width >>= 1) {
                bool upper = (g & width) != 0;
#pragma unroll
                for (int i = 0; i < width; ++i) {
                    float give = upper ? sums[i] : sums[i + width];
                    float got = __shfl_xor_sync(0xFFFFFFFF, give, width * 4);
                    sums[i] = (upper ? sums[i + width] : sums[i]) + got;
                    if (PEAKS) {
                        give = upper ? tops[i] : tops[i + width];
                        got = __shfl_xor_sync(0xFFFFFFFF, give, width * 4);
                        tops[i] = fmaxf(upper ? tops[i + width] : tops[i], got);
                    }
                }
            }
            // lane g has sum number g: token 8 * (g >> 1) + 2q + (g & 1)
            int place = (group * 4 + warp) * BN + part * ZT + 8 * (g >> 1) + 2 * q + (g & 1);
            shares[place] = sums[0];
            if (PEAKS) shares[SHARES + place] = tops[0];
        }
        if (OUTER) {
            float* to = p.sums + ((long long)t.index * p.F + f) * RANKS + 2 * q;
#pragma unroll
            for (int tile = 0; tile < MT; ++tile)
                if (f + tile * 64 < p.F) {
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int n = 0; n < 2; ++n)
                            store2(to + (tile * 64 + half) * RANKS + n * 8, outer[tile][n][2 * half],
                                   outer[tile][n][2 * half + 1]);
                }
        }
        // this consumer's features alone: consumers never wait for each other
        named_sync(2 + group, 128);
        for (int r = warp * 32 + lane; r < t.rows; r += 128) {
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += shares[(group * 4 + i) * BN + r];
            long long at_row = (long long)(t.index_f * CONSUMERS + group) * p.num_rows + t.row0 + r;
            p.shares[at_row] = sum;
            if (PEAKS) {
                float top = 0.f;
#pragma unroll
                for (int i = 0; i < 4; ++i) top = fmaxf(top, shares[SHARES + (group * 4 + i) * BN + r]);
                p.peaks[at_row] = top;
            }
        }
        named_sync(2 + group, 128);
    }
};

extern "C" __global__ void __launch_bounds__(128 * (1 + CONSUMERS), 1) product(const __grid_constant__ Params p) {
    // [stages, from a multiple of 1024][barriers][records][which rows two tiles read][shares][experts' tiles]
    extern __shared__ u8 raw[];
    u8* shared = raw + (-smem_address(raw) & 1023);
    u64* barriers = (u64*)(shared + STAGES * STAGE_BYTES);
    u64* records = barriers + 16;
    int* lists = (int*)(records + RECORDS * 4);
    float* shares = (float*)(lists + 2 * 16 * LIST);
    int* before = (int*)(shares + (1 + PEAKS) * SHARES);
    int thread = threadIdx.x, lane = thread & 31;
    u32 full = smem_address(barriers), empty = full + STAGES * 8;
    if (thread < 32) {
        // an inclusive scan of the experts' token tiles
        int sum = 0;
        for (int e0 = 0; e0 < p.E; e0 += 32) {
            int e = e0 + lane, tiles = 0;
            if (e < p.E) {
                tiles = (__ldg(p.offsets + e) - first_row(p, e) + BN - 1) / BN;
            }
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                int other = __shfl_up_sync(0xFFFFFFFF, tiles, d);
                if (lane >= d) tiles += other;
            }
            if (e < p.E) before[e + 1] = sum + tiles;
            sum += __shfl_sync(0xFFFFFFFF, tiles, 31);
        }
        if (lane == 0) before[0] = 0;
    }
    if (thread == 64) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + i * 8, 256);
            barrier_init(empty + i * 8, CONSUMERS * (EVERY_LANE ? 128 : 4));
        }
        barriers_ready();
    }
    __syncthreads();
    Schedule schedule{p, before, p.E, (p.F + TILE_F - 1) / TILE_F};
    u32 stages = smem_address(shared), record = smem_address(records);
    if (thread < 128) {
        producer_registers();
        produce(p, schedule, stages, full, empty, record, smem_address(lists), thread);
    } else {
        consumer_registers();
        int group = (thread >> 7) - 1, warp = (thread >> 5) & 3;
        Ring ring{stages, full, empty, 0, 0};
        int total = schedule.total();
        for (int id = blockIdx.x, n = 0; id < total; id += gridDim.x, ++n) {
            Tile t;
            ring.look();
            t.read(record + n % RECORDS * 32);
            Work work;
            work.run(p, t, ring, group, warp, lane, shares);
        }
    }
}
