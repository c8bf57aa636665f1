// A GPU small enough to think about: what `backend/sgmv/cuda` asks of CUDA, on the CPU. Blocks of a launch are threads of the
// process and run at the same time; a block's threads are fibers that take turns, and give way only where the kernel waits for
// others. Copies are done at once, so that what a kernel forgets to wait for is not found here; wrong indices, sums in another order and
// waits that never end are.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim { u32 x, y = 1, z = 1; };

inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

struct Fiber {
    ucontext_t beginning;
    jmp_buf place;  // where it goes on: a switch by it, unlike swapcontext, is no system call
    bool begun = false;
    dim index;
    std::function<bool()> ready;
    bool done = false;
};

struct Lanes {  // threads that do one operation together
    int arrived = 0;
    long generation = 0;
    void* mine[128];
};

struct Cluster {
    std::atomic<int> arrived{0};
    std::atomic<long> generation{0};
    std::vector<struct Block*> blocks;
};

struct Block {
    dim index, grid, size;
    char* shared;  // what the launch asked for
    Cluster* cluster;
    u32 rank;
    std::function<void()> kernel;
    std::vector<Fiber> fibers;
    Fiber* current;
    jmp_buf scheduler;
    Lanes warps[32], groups[8], barriers[16];
};

inline thread_local Block* running;
#define threadIdx (running->current->index)
#define blockIdx (running->index)
#define gridDim (running->grid)
#define blockDim (running->size)

inline void leave() {
    if (_setjmp(running->current->place) == 0) _longjmp(running->scheduler, 1);
}

// Gives way to other threads until `ready`.
template <class Ready>
void until(Ready ready) {
    if (ready()) return;
    running->current->ready = ready;
    leave();
}

inline void give_way() {
    running->current->ready = [] { return true; };
    leave();
}

template <class Data, class All>
void together(Lanes& lanes, int lane, int count, Data& mine, All all) {
    lanes.mine[lane] = &mine;
    const long before = lanes.generation;
    if (++lanes.arrived == count) {
        all((Data**)lanes.mine);
        lanes.arrived = 0, lanes.generation++;
    } else
        until([&] { return lanes.generation != before; });
}

template <class Data, class All>
void in_warp(Data& mine, All all) { together(running->warps[threadIdx.x / 32], threadIdx.x % 32, 32, mine, all); }

inline void arrive(int barrier, int count) {
    Lanes& b = running->barriers[barrier];
    if (++b.arrived == count) b.arrived = 0, b.generation++;
}

inline void meet_at(int barrier, int count) {
    Lanes& b = running->barriers[barrier];
    const long before = b.generation;
    arrive(barrier, count);
    until([&] { return b.generation != before; });
}

template <int ID>
void meet(int threads) { meet_at(ID, threads); }
inline void __syncthreads() { meet_at(0, blockDim.x); }
inline void __syncwarp() { int none; in_warp(none, [](int**) {}); }

template <class T>
T __shfl_sync(u32, T value, int from) {
    struct { T value, out; int from; } mine{value, value, from};
    in_warp(mine, [](auto** all) { for (int i = 0; i < 32; i++) all[i]->out = all[all[i]->from]->value; });
    return mine.out;
}
template <class T>
T __shfl_up_sync(u32 mask, T value, int by) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(mask, value, lane < by ? lane : lane - by);
}
inline u32 __match_any_sync(u32, int value) {
    struct { int value; u32 out; } mine{value, 0};
    in_warp(mine, [](auto** all) {
        for (int i = 0; i < 32; i++)
            for (int j = 0; j < 32; j++) all[i]->out |= u32(all[i]->value == all[j]->value) << j;
    });
    return mine.out;
}
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline u32 __byte_perm(u32 a, u32 b, u32 pick) {
    const u64 both = (u64)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= u32(both >> (pick >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}
template <class T>
T __ldg(const T* p) { return *p; }
inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
inline u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
inline int atomicAdd(int* p, int v) { const int old = *p; *p += v; return old; }
inline int atomicMax(int* p, int v) { const int old = *p; *p = max(old, v); return old; }

inline void wait_for_previous() {}
inline void let_next_start() {}
inline uint4 load_weight(const u16* p) { uint4 v; memcpy(&v, p, 16); return v; }
inline uint4 load_row(const u16* p) { return load_weight(p); }
inline void copy_async(void* to, const void* from, bool valid) { valid ? (void)memcpy(to, from, 16) : (void)memset(to, 0, 16); }
inline void commit_copies() {}
template <int LEFT>
void wait_for_copies() {}

#ifdef FP16
inline float widen(u32 pair, int high) { _Float16 h; const u16 v = high ? pair >> 16 : pair; memcpy(&h, &v, 2); return h; }
inline u16 narrow(float f) { const _Float16 h = f; u16 v; memcpy(&v, &h, 2); return v; }
#else
inline float widen(u32 pair, int high) { return __uint_as_float(high ? pair & 0xffff0000u : pair << 16); }
inline u16 narrow(float f) {
    const u32 v = __float_as_uint(f);
    return f != f ? 0x7fff : u16((v + 0x7fff + (v >> 16 & 1)) >> 16);
}
#endif
inline u32 pack(float low, float high) { return (u32)narrow(high) << 16 | narrow(low); }
inline float swiglu(float gate, float up) { return gate * (1.f / (1.f + exp2f(-gate * 1.4426950408889634f))) * up; }
inline float arithmetic(float f) { return f == f ? f : __uint_as_float(0x7fffffff); }  // its NaN

inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    struct { float* c; u32 a[4], b[2]; } mine{c, {a0, a1, a2, a3}, {b0, b1}};
    in_warp(mine, [](auto** all) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 8; i++) {
                const int g = lane / 4, k = lane % 4 * 2 + (i & 1) + (i >> 2) * 8;
                a[g + (i >> 1 & 1) * 8][k] = widen(all[lane]->a[i >> 1], i & 1);
                if (i < 4) b[lane % 4 * 2 + (i & 1) + (i >> 1) * 8][g] = widen(all[lane]->b[i >> 1], i & 1);
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + (i >> 1) * 8, column = lane % 4 * 2 + (i & 1);
                float sum = all[lane]->c[i];
                for (int k = 0; k < 16; k++) sum = arithmetic(sum + a[row][k] * b[k][column]);
                all[lane]->c[i] = sum;
            }
    });
}

// Hopper: matrices that the copy engine knows, its barriers, products of 128 threads, clusters.
struct alignas(64) TensorMap {
    const char* address;
    long long width, rows, stride_bytes, box_rows;
    long long unused[11];
};

struct Phase { u16 pending, count; int bytes : 31; u32 odd : 1; };
static_assert(sizeof(Phase) == sizeof(u64), "");
inline void settle_phase(Phase& b) {
    if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.odd ^= 1;
}
inline void barrier_init(u64* barrier, int arrivals) { *(Phase*)barrier = {(u16)arrivals, (u16)arrivals, 0, 0}; }
inline void barrier_arrive(u64* barrier) { ((Phase*)barrier)->pending--, settle_phase(*(Phase*)barrier); }
inline void barrier_expect(u64* barrier, int bytes) { ((Phase*)barrier)->bytes += bytes, barrier_arrive(barrier); }
inline void barrier_wait(u64* barrier, int parity) {
    until([=] { return (int)((volatile Phase*)barrier)->odd != parity; });
}
inline void copy_box(void* to, const TensorMap& map, int column, int row, u64* barrier) {
    for (int r = 0; r < map.box_rows; r++)
        for (int chunk = 0; chunk < 8; chunk++)
            for (int i = 0; i < 8; i++) {
                const long long at = column + chunk * 8 + i, line = row + r;
                u16 v = 0;
                if (at < map.width && line < map.rows) memcpy(&v, map.address + line * map.stride_bytes + at * 2, 2);
                ((u16*)to)[r * 64 + (chunk ^ (r & 7)) * 8 + i] = v;
            }
    ((Phase*)barrier)->bytes -= map.box_rows * 128;
    settle_phase(*(Phase*)barrier);
}

inline u64 box_descriptor(const u16* box) { return (u64)box >> 4; }
inline float boxed(u64 descriptor, int row, int k) {
    const u16* box = (const u16*)((descriptor & ~7ull) << 4);
    const int chunk = (int)(descriptor & 7) + k / 8;
    return widen(box[row * 64 + (chunk ^ (row & 7)) * 8 + k % 8], 0);
}
template <int COUNT>
void wgmma(float (&c)[COUNT], u64 w, u64 x) {
    struct { float* c; } mine{c};
    together(running->groups[threadIdx.x / 128], threadIdx.x % 128, 128, mine, [=](auto** all) {
        static thread_local float a[64][16], b[2 * COUNT][16];
        for (int k = 0; k < 16; k++) {
            for (int row = 0; row < 64; row++) a[row][k] = boxed(w, row, k);
            for (int row = 0; row < 2 * COUNT; row++) b[row][k] = boxed(x, row, k);
        }
        for (int t = 0; t < 128; t++)
            for (int i = 0; i < COUNT; i++) {
                const int row = t / 32 * 16 + t % 32 / 4 + (i >> 1 & 1) * 8, column = i / 4 * 8 + t % 4 * 2 + (i & 1);
                for (int k = 0; k < 16; k++) all[t]->c[i] = arithmetic(all[t]->c[i] + a[row][k] * b[column][k]);
            }
    });
}
template <int LEFT>
void wgmma_wait() {}

inline u32 shared_address(const void* p) { return (u32)((const char*)p - running->shared); }
inline u32 cluster_rank() { return running->rank; }
inline u32 cluster_size() { return (u32)running->cluster->blocks.size(); }
inline float4 load_from(u32 address, u32 rank) {
    float4 v;
    memcpy(&v, running->cluster->blocks[rank]->shared + address, 16);
    return v;
}
inline void cluster_sync() {
    Cluster& c = *running->cluster;
    const long before = c.generation;
    if (++c.arrived == (int)(c.blocks.size() * blockDim.x))
        c.arrived = 0, c.generation++;
    else
        until([&, before] { return c.generation != before; });
}

typedef void (*Kernel)(void**);
inline std::map<std::string, Kernel>& known() { static std::map<std::string, Kernel> all; return all; }
struct Register { Register(const char* name, Kernel kernel) { known()[name] = kernel; } };
#define KERNEL(NAME, THREADS, BLOCKS, ARGS, BODY) \
    static Register NAME##_known(#NAME, [](void** a) { BODY(*(const ARGS*)a[0]); });

#define STACK (1 << 16)
#define PATIENCE_S 60  // a launch that takes longer is taken for one that never ends

inline void start() {
    running->kernel();
    running->current->done = true;
    leave();
}

inline void go_on(Fiber& fiber) {
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.beginning);
}

// Runs the block's fibers in turn; false if it was given up.
inline bool run(Block& mine, std::atomic<bool>& hopeless) {
    running = &mine;
    const size_t bytes = mine.fibers.size() * STACK;
    char* stacks = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (size_t i = 0; i < mine.fibers.size(); i++) {
        Fiber& fiber = mine.fibers[i];
        fiber.index = {(u32)i};
        getcontext(&fiber.beginning);
        fiber.beginning.uc_stack.ss_sp = stacks + i * STACK;
        fiber.beginning.uc_stack.ss_size = STACK;
        makecontext(&fiber.beginning, start, 0);
    }
    const auto begun = std::chrono::steady_clock::now();
    for (size_t left = mine.fibers.size(); left > 0;) {
        bool moved = false;
        for (Fiber& fiber : mine.fibers) {
            if (fiber.done || (fiber.ready && !fiber.ready())) continue;
            fiber.ready = nullptr;
            mine.current = &fiber;
            if (_setjmp(mine.scheduler) == 0) go_on(fiber);
            left -= fiber.done, moved = true;
        }
        if (std::chrono::steady_clock::now() - begun > std::chrono::seconds(PATIENCE_S)) hopeless = true;
        if (hopeless) break;
        if (!moved) std::this_thread::yield();
    }
    munmap(stacks, bytes);
    return !hopeless;
}

extern "C" int launch(const char* name, int grid, int threads, void** arguments, int shared_bytes, int cluster) {
    const auto found = known().find(name);
    if (found == known().end()) return 1;
    std::vector<Block> blocks(grid);
    std::vector<Cluster> clusters(grid / cluster);
    std::vector<std::unique_ptr<char[]>> memory;
    std::vector<std::thread> threads_of_blocks;
    std::atomic<bool> hopeless{false};
    for (int i = 0; i < grid; i++) {
        memory.emplace_back(new char[shared_bytes + 1024]);
        memset(memory.back().get(), 0xff, shared_bytes + 1024);  // NaN: nothing is there until it is written
        Block& b = blocks[i];
        b.index = {(u32)i}, b.grid = {(u32)grid}, b.size = {(u32)threads};
        b.shared = (char*)(((u64)memory.back().get() + 1023) & ~1023ull);
        b.cluster = &clusters[i / cluster], b.rank = i % cluster;
        b.kernel = [=] { found->second(arguments); };
        b.fibers.resize(threads);
        b.cluster->blocks.push_back(&b);
    }
    for (Block& b : blocks) threads_of_blocks.emplace_back([&] { run(b, hopeless); });
    for (std::thread& t : threads_of_blocks) t.join();
    return hopeless ? 2 : 0;
}
