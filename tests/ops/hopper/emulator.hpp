// The instructions of `instructions.cuh` on any processor, to run `product.cu` as it is: a block's threads are fibers
// that run until they wait for each other. What the hardware does later is done as late as it may be (multiplications
// at the wait for them), what may come early is done at once (copies), and memory of a block begins as NaN.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n) alignas(n)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

using std::max;
using std::min;

// ---------------------------------------------------------------- threads

constexpr int THREADS = 128 * (1 + CONSUMERS), WARP = 32, WARPGROUP = 128;
constexpr u32 SHARED = 232448, SHARED_FROM = 1024;   // no address is 0
extern "C" { alignas(1024) u8 raw[SHARED]; }

struct Thread {
    ucontext_t context;
    std::unique_ptr<u8[]> stack;
    int index;
    bool done;
    // waits while (*at & mask) == value, or with mask 0 while *at < value
    const u64* at;
    u64 mask, value;
    u64 multiplications;          // posted so far
    std::deque<u64> committed;    // where each group ends that it has not waited for
    bool fenced;
    bool waits() const { return at && (mask ? (*at & mask) == value : *at < value); }
};

static Thread threads[THREADS];
static Thread* self;
static ucontext_t scheduler;
static char problem[256];

[[noreturn]] static void fail(const char* what, long long number = 0) {
    if (!problem[0]) snprintf(problem, sizeof problem, "thread %d: %s (%lld)", self ? self->index : -1, what, number);
    self->done = true;
    swapcontext(&self->context, &scheduler);
    abort();
}
static void wait_while(const u64* at, u64 mask, u64 value) {
    self->at = at, self->mask = mask, self->value = value;
    while (self->waits()) swapcontext(&self->context, &scheduler);
    self->at = nullptr;
}

// Threads meet; the last one does what is to be done once.
struct Meeting {
    int here = 0;
    u64 turn = 0;
    template <class Once> void meet(int size, Once once) {
        if (++here == size) {
            here = 0;
            once();
            ++turn;
        } else wait_while(&turn, ~0ull, turn);
    }
};
static Meeting warps[THREADS / WARP], warpgroups[THREADS / WARPGROUP], named[16];

static int lane_of() { return self->index % WARP; }
static int warp_of() { return self->index / WARP; }

struct Index { u32 x; };
static Index blockIdx, gridDim;
static Index thread_index() { return {(u32)self->index}; }
#define threadIdx thread_index()

static void __syncthreads() { named[0].meet(THREADS, [] {}); }
static void __syncwarp() { warps[warp_of()].meet(WARP, [] {}); }
static void named_sync(int id, int size) { named[id].meet(size, [] {}); }

static u32 offered[THREADS], given[THREADS];
static u32 exchange(u32 value, int from) {
    int first = warp_of() * WARP;
    offered[self->index] = value;
    warps[warp_of()].meet(WARP, [&] { memcpy(given + first, offered + first, WARP * 4); });
    return given[first + from];
}
template <class T> T exchange_any(T value, int from) {
    u32 word;
    static_assert(sizeof value == 4, "");
    memcpy(&word, &value, 4);
    word = exchange(word, from);
    memcpy(&value, &word, 4);
    return value;
}
template <class T> T __shfl_xor_sync(u32, T value, int mask) { return exchange_any(value, lane_of() ^ mask); }
template <class T> T __shfl_sync(u32, T value, int lane) { return exchange_any(value, lane); }
template <class T> T __shfl_up_sync(u32, T value, int delta) {
    return exchange_any(value, lane_of() >= delta ? lane_of() - delta : lane_of());
}

static u32 __ballot_sync(u32, bool value) {
    u32 votes = 0;
    exchange(value, 0);
    for (int i = 0; i < WARP; ++i) votes |= given[warp_of() * WARP + i] << i;
    return votes;
}
static int __popc(u32 x) { return __builtin_popcount(x); }

// ---------------------------------------------------------------- memory

static u32 smem_address(const void* p) { return (u32)((const u8*)p - raw) + SHARED_FROM; }
static u8* shared_at(u32 address, u32 bytes) {
    if (address < SHARED_FROM || address + bytes > SHARED_FROM + SHARED) fail("outside of shared memory", address);
    if (address % bytes) fail("an address that is not aligned", address);
    return raw + (address - SHARED_FROM);
}
template <class T> T load_shared(u32 a) { T v; memcpy(&v, shared_at(a, sizeof v), sizeof v); return v; }
template <class T> void store_shared(u32 a, T v) { memcpy(shared_at(a, sizeof v), &v, sizeof v); }
static u32 lds32(u32 a) { return load_shared<u32>(a); }
static void lds64(u32 a, u32& x, u32& y) { u64 v = load_shared<u64>(a); x = (u32)v, y = (u32)(v >> 32); }
static float ldsf(u32 a) { return load_shared<float>(a); }
static void lds128(u32 a, u32& x, u32& y, u32& z, u32& w) { shared_at(a, 16), lds64(a, x, y), lds64(a + 8, z, w); }
static void lds_float2(u32 a, float& x, float& y) { shared_at(a, 8); x = ldsf(a), y = ldsf(a + 4); }
static void sts32(u32 a, u32 v) { store_shared(a, v); }
static void sts64(u32 a, u32 x, u32 y) { store_shared(a, (u64)y << 32 | x); }
static void sts128(u32 a, u32 x, u32 y, u32 z, u32 w) { shared_at(a, 16), sts64(a, x, y), sts64(a + 8, z, w); }
static void sts16(u32 a, u16 v) { store_shared(a, v); }
static void stsf(u32 a, float v) { store_shared(a, v); }

static void copy16(u32 to, const void* from, bool valid) {
    if ((u64)from % 16) fail("a copy from an address that is not aligned", (u64)from);
    if (valid) memcpy(shared_at(to, 16), from, 16);
    else memset(shared_at(to, 16), 0, 16);
}
static void copy4(u32 to, const void* from) { memcpy(shared_at(to, 4), from, 4); }
static void store_if(u16* to, u32 value, bool live) {
    if (live) memcpy(to, &value, 4);
}
static void store4_if(u16* to, const u32 (&x)[4], bool live) {
    if (!live) return;
    if ((u64)to % 16) fail("four words are stored at an address that is not aligned", (u64)to);
    memcpy(to, x, 16);
}
static void store2(float* to, float x, float y) {
    if ((u64)to % 8) fail("a pair is stored at an address that is not aligned", (u64)to);
    to[0] = x, to[1] = y;
}
template <class T> T __ldg(const T* p) { return *p; }

static u32 swizzled(u32 address, int span) {
    return span == 128 ? address ^ ((address >> 3) & 0x70) : address ^ ((address >> 3) & 0x30);
}

// 8 by 8 numbers of two bytes, four times; a thread has a pair of a row, or with `turned` of a column
static u32 lines[THREADS], lines_given[THREADS];
static void matrices(u32 a, u32* out, bool turned) {
    int first = warp_of() * WARP, g = lane_of() / 4, q = lane_of() % 4;
    lines[self->index] = a;
    warps[warp_of()].meet(WARP, [&] { memcpy(lines_given + first, lines + first, WARP * 4); });
    for (int i = 0; i < 4; ++i) {
        const u32* rows = lines_given + first + 8 * i;
        if (turned) {
            u32 low = load_shared<u16>(shared_at(rows[2 * q], 16) - raw + SHARED_FROM + 2 * g);
            u32 high = load_shared<u16>(shared_at(rows[2 * q + 1], 16) - raw + SHARED_FROM + 2 * g);
            out[i] = low | high << 16;
        } else {
            shared_at(rows[g], 16);
            out[i] = lds32(rows[g] + 4 * q);
        }
    }
}
static void matrix4(u32 a, u32& x, u32& y, u32& z, u32& w) {
    u32 out[4];
    matrices(a, out, false);
    x = out[0], y = out[1], z = out[2], w = out[3];
}
static void matrix4_turned(u32 a, u32& x, u32& y, u32& z, u32& w) {
    u32 out[4];
    matrices(a, out, true);
    x = out[0], y = out[1], z = out[2], w = out[3];
}

// ---------------------------------------------------------------- barriers

struct Barrier {
    u32 count, left;
    long long bytes;
    u64 phase;
    void settle() {
        if (left == 0 && bytes == 0) ++phase, left = count;
    }
};
static std::map<u32, Barrier> barriers;
static Barrier& barrier(u32 bar) {
    auto found = barriers.find(bar);
    if (found == barriers.end()) fail("no barrier was made here", bar);
    return found->second;
}
static void barrier_init(u32 bar, u32 count) { barriers[bar] = {count, count, 0, 0}; }
static void barriers_ready() {}
static void barrier_arrive(u32 bar) {
    Barrier& b = barrier(bar);
    if (b.left == 0) fail("more arrivals than a barrier has", bar);
    --b.left;
    b.settle();
}
static void barrier_wait(u32 bar, u32 parity) { wait_while(&barrier(bar).phase, 1, parity); }
static void barrier_expect(u32 bar, u32 bytes) { barrier(bar).bytes += bytes; }
static void copy_arrive(u32 bar) { barrier_arrive(bar); }
static void fence_async() {}
static void producer_registers() {}
static void consumer_registers() {}

// A tensor map as tests write it, dimensions that are not there of one element.
struct Map {
    u64 address, dims[5], strides[4], box[5], size;
};
static void fetch_box(u32 to, const void* map, u32 bar, const int (&start)[5]) {
    const Map& m = *(const Map*)map;
    u32 line = m.box[0] * m.size, at = to, lines = 1;
    if (to % 1024) fail("a box of 128-byte swizzle at an odd address", to);
    if (line > 128) fail("a box wider than its swizzle", line);
    if (start[0] * m.size % 16) fail("a box from an odd column", start[0]);
    for (int i = 1; i < 5; ++i) lines *= m.box[i];
    for (u32 number = 0; number < lines; ++number, at += line) {
        u64 offset = 0, rest = number;
        bool inside = true;
        for (int i = 1; i < 5; ++i) {
            u64 x = start[i] + rest % m.box[i];
            rest /= m.box[i];
            inside = inside && x < m.dims[i];
            offset += x * m.strides[i - 1];
        }
        for (u32 byte = 0; byte < line; ++byte) {
            u64 x = start[0] + byte / m.size;
            bool there = inside && x < m.dims[0];
            *shared_at(swizzled(at + byte, 128), 1) = there ? ((const u8*)m.address)[offset + x * m.size + byte % m.size] : 0;
        }
    }
    Barrier& b = barrier(bar);
    b.bytes -= at - to;
    b.settle();
}
static void tensor3(u32 to, const void* map, u32 bar, int x, int y, int z) { fetch_box(to, map, bar, {x, y, z}); }
static void tensor4(u32 to, const void* map, u32 bar, int x, int y, int z, int w) { fetch_box(to, map, bar, {x, y, z, w}); }
static void tensor5(u32 to, const void* map, u32 bar, int x, int y, int z, int w, int v) {
    fetch_box(to, map, bar, {x, y, z, w, v});
}

// ---------------------------------------------------------------- numbers

static float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static u32 float_bits(float f) { u32 v; memcpy(&v, &f, 4); return v; }
static u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
static u32 __byte_perm(u32 a, u32 b, u32 how) {
    u64 both = (u64)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) out |= (u32)(both >> (how >> (4 * i) & 7) * 8 & 0xFF) << 8 * i;
    return out;
}
static u16 round_bf16(double x) {
    // to odd first, so that the second rounding is the only one
    float f = (float)x;
    u32 v = float_bits(f);
    if (f != f) return 0x7FFF;
    if ((double)f != x && !(v & 1)) v = std::fabs((double)f) > std::fabs(x) ? v - 1 : v + 1;
    v += 0x7FFF + (v >> 16 & 1);
    return v >> 16;
}
static float bf16(u32 v) { return __uint_as_float(v << 16); }
static u32 pair_bf16(double low, double high) { return round_bf16(low) | (u32)round_bf16(high) << 16; }
static u32 pack_bf16(float low, float high) { return pair_bf16(low, high); }
static u32 mul_bf16(u32 a, u32 b) {
    return pair_bf16((double)bf16(a & 0xFFFF) * bf16(b & 0xFFFF), (double)bf16(a >> 16) * bf16(b >> 16));
}
static u32 fma_bf16(u32 a, u32 b, u32 c) {
    return pair_bf16((double)bf16(a & 0xFFFF) * bf16(b & 0xFFFF) + bf16(c & 0xFFFF),
                     (double)bf16(a >> 16) * bf16(b >> 16) + bf16(c >> 16));
}
// rows of the left operand by g and g + 8, its columns, and rows of the right one, by 2q, 2q + 1 and 8 more
static u32 fragments[THREADS][6], fragments_given[THREADS][6];
static void warp_multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    int first = warp_of() * WARP, g = lane_of() / 4, q = lane_of() % 4;
    u32 words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(fragments[self->index], words, sizeof words);
    warps[warp_of()].meet(WARP, [&] { memcpy(fragments_given + first, fragments + first, WARP * sizeof words); });
    for (int i = 0; i < 4; ++i) {
        int row = g + (i >> 1) * 8, column = 2 * q + (i & 1);
        for (int k = 0; k < 16; ++k) {
            int at = k % 8 / 2, word = k / 8, shift = k % 2 * 16;
            u32 left = fragments_given[first + row % 8 * 4 + at][word * 2 + row / 8];
            u32 right = fragments_given[first + column * 4 + at][4 + word];
            c[i] += bf16(left >> shift & 0xFFFF) * bf16(right >> shift & 0xFFFF);
        }
    }
}
static float exp2_approx(float x) { return std::exp2(x); }
static float reciprocal_approx(float x) { return 1.f / x; }
static float tanh_approx(float x) { return std::tanh(x); }
static float e4m3(u8 code) {
    int exponent = code >> 3 & 15, digits = code & 7;
    float value = exponent ? std::ldexp(8.f + digits, exponent - 10) : std::ldexp((float)digits, -9);
    if (exponent == 15 && digits == 7) value = NAN;
    return code & 128 ? -value : value;
}

// ---------------------------------------------------------------- multiplications

// 64 rows by COLUMNS; what each of a warpgroup's threads gave
struct Multiplication {
    bool narrow, turned, registers;
    int posted = 0, keep;
    u64 left, right;
    float* sums[WARPGROUP];
    u32 words[WARPGROUP][4];

    int depth() const { return narrow ? 32 : 16; }
    static u32 place(u64 descriptor, u32 row, u32 byte) {
        u32 from = (u32)(descriptor & 0x3FFF) << 4, stride = (u32)(descriptor >> 32 & 0x3FFF) << 4;
        int span = descriptor >> 62 == 1 ? 128 : 64;
        return swizzled(from + row / 8 * stride + row % 8 * span + byte, span);
    }
    float number(u64 descriptor, u32 row, u32 k) const {
        return narrow ? e4m3(load_shared<u8>(place(descriptor, row, k)))
                      : bf16(load_shared<u16>(place(descriptor, row, 2 * k)));
    }
    void run() const {
        static float a[64][32], b[32][256];
        int deep = depth(), wide = narrow ? 4 : 2;   // numbers of a word
        if (registers)
            for (int t = 0; t < WARPGROUP; ++t)
                for (int i = 0; i < 4; ++i)
                    for (int n = 0; n < wide; ++n) {
                        int row = t / 32 * 16 + t % 32 / 4 + (i & 1) * 8, k = (i >> 1) * deep / 2 + t % 4 * wide + n;
                        u32 word = words[t][i];
                        a[row][k] = narrow ? e4m3(word >> 8 * n) : bf16(word >> 16 * n & 0xFFFF);
                    }
        else
            for (int row = 0; row < 64; ++row)
                for (int k = 0; k < deep; ++k)
                    a[row][k] = turned ? number(left, k, row) : number(left, row, k);
        for (int n = 0; n < COLUMNS; ++n)
            for (int k = 0; k < deep; ++k) b[k][n] = number(right, n, k);
        for (int row = 0; row < 64; ++row) {
            float sum[256] = {};
            for (int k = 0; k < deep; ++k)
                for (int n = 0; n < COLUMNS; ++n) sum[n] += a[row][k] * b[k][n];
            for (int n = 0; n < COLUMNS; ++n) {
                float* to = sums[row / 16 * 32 + row % 8 * 4 + n % 8 / 2] + n / 8 * 4 + row % 16 / 8 * 2 + n % 2;
                *to = (keep ? *to : 0.f) + sum[n];
            }
        }
    }
};

struct Pipe {
    std::deque<Multiplication> waiting;   // from number `first`
    u64 first = 0, posted = 0;            // done so far, and posted by all threads
};
static Pipe pipes[THREADS / WARPGROUP];

static void post(bool narrow, bool turned, bool registers, float* sums, const u32* words, u64 left, u64 right, int keep) {
    if (!self->fenced) fail("a multiplication without a fence before it");
    Pipe& pipe = pipes[self->index / WARPGROUP];
    u64 number = self->multiplications++;
    while (pipe.first + pipe.waiting.size() <= number) pipe.waiting.emplace_back();
    Multiplication& m = pipe.waiting[number - pipe.first];
    int t = self->index % WARPGROUP;
    if (m.posted && (m.left != left || m.right != right || m.narrow != narrow || m.turned != turned || m.keep != keep))
        fail("threads of a warpgroup multiply different operands", number);
    m.narrow = narrow, m.turned = turned, m.registers = registers, m.left = left, m.right = right, m.keep = keep;
    m.sums[t] = sums;
    if (words) memcpy(m.words[t], words, sizeof m.words[t]);
    if (++m.posted == WARPGROUP) ++pipe.posted;
}
static void mma_fence() { self->fenced = true; }
static void settle(u32 (&)[4]) {}
static void settle(u64&) {}
static void mma_commit() { self->committed.push_back(self->multiplications); }
template <int LEFT> void mma_wait() {
    Pipe& pipe = pipes[self->index / WARPGROUP];
    self->fenced = false;
    if (self->committed.size() <= LEFT) return;
    u64 until = self->committed[self->committed.size() - LEFT - 1];
    self->committed.erase(self->committed.begin(), self->committed.end() - LEFT);
    // the other threads need not wait for it yet
    wait_while(&pipe.posted, 0, until);
    for (; pipe.first < until; ++pipe.first) {
        pipe.waiting.front().run();
        pipe.waiting.pop_front();
    }
}
struct MMA {
    typedef float Sums[COLUMNS / 2];
    static void wide(Sums& d, u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int keep) {
        u32 words[4] = {a0, a1, a2, a3};
        post(false, false, true, d, words, 0, b, keep);
    }
    static void wide_ss(Sums& d, u64 a, u64 b, int keep) { post(false, false, false, d, nullptr, a, b, keep); }
    static void wide_ss_turned(Sums& d, u64 a, u64 b, int keep) { post(false, true, false, d, nullptr, a, b, keep); }
    static void narrow_rs(Sums& d, u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int keep) {
        u32 words[4] = {a0, a1, a2, a3};
        post(true, false, true, d, words, 0, b, keep);
    }
    static void narrow_ss(Sums& d, u64 a, u64 b, int keep) { post(true, false, false, d, nullptr, a, b, keep); }
};

// ---------------------------------------------------------------- launch

struct Params;
extern "C" void product(const Params p);
static const Params* parameters;
static void enter();

static bool run_block() {
    memset(raw, 0xFF, sizeof raw);
    barriers.clear();
    for (Meeting& m : warps) m = {};
    for (Meeting& m : named) m = {};
    for (Pipe& pipe : pipes) pipe = {};
    for (int i = 0; i < THREADS; ++i) {
        Thread& t = threads[i];
        constexpr size_t STACK = 1 << 18;
        if (!t.stack) t.stack.reset(new u8[STACK]);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.get();
        t.context.uc_stack.ss_size = STACK;
        t.context.uc_link = nullptr;
        t.index = i, t.done = false, t.at = nullptr, t.multiplications = 0, t.fenced = false;
        t.committed.clear();
        makecontext(&t.context, enter, 0);
    }
    for (;;) {
        bool ran = false, left = false;
        for (int i = 0; i < THREADS; ++i) {
            // other blocks, another order
            Thread& t = threads[blockIdx.x % 2 ? THREADS - 1 - i : i];
            if (t.done) continue;
            left = true;
            if (t.waits()) continue;
            ran = true;
            self = &t;
            swapcontext(&scheduler, &t.context);
            if (problem[0]) return false;
        }
        if (!left) break;
        if (!ran) {
            int stuck = 0;
            for (Thread& t : threads) stuck += !t.done;
            snprintf(problem, sizeof problem, "%d threads wait for each other for good", stuck);
            return false;
        }
    }
    for (Pipe& pipe : pipes)
        if (!pipe.waiting.empty()) {
            snprintf(problem, sizeof problem, "a multiplication that nobody waited for");
            return false;
        }
    return true;
}

// What went wrong, or nothing.
extern "C" const char* emulate(const Params* p, u32 blocks) {
    problem[0] = 0;
    parameters = p;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        if (!run_block()) break;
    return problem;
}
