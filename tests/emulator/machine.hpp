// A GPU small enough to think about: what `backend/sgmv/cuda` asks of CUDA, on the CPU. Blocks of a launch are threads of the
// process and run at the same time; a block's threads are fibers that take turns, and give way only where the kernel waits for
// others. What may happen late happens as late as it may, so that what a kernel does not wait for is not there: copies are done
// when their thread waits for them, boxes after all others had a turn; and a launch that may begin early gets as far as it
// can before its predecessor goes on.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
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

struct int4 { int x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct int2 { int x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim { u32 x; };

inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

struct Copy {
    void* to;
    const void* from;  // null: zeros
};

struct Fiber {
    ucontext_t beginning;
    jmp_buf place;  // where it goes on: a switch by it, unlike swapcontext, is no system call
    bool begun = false;
    dim index;
    std::function<bool()> ready;
    bool done = false, released = false;  // released: the next launch may start, for all it knows
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> committed;
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
    struct Launch* launch;
    char* shared;  // what the launch asked for
    Cluster* cluster;
    u32 rank;
    std::vector<Fiber> fibers;
    std::vector<std::function<void()>> boxes;  // on their way
    Fiber* current;
    jmp_buf scheduler;
    Lanes warps[32], groups[8], barriers[16];
};

struct Launch {
    std::string name;
    std::function<void()> kernel;
    std::vector<Block> blocks;
    std::vector<Cluster> clusters;
    std::vector<std::unique_ptr<char[]>> memory;
    std::shared_ptr<Launch> previous;
    Launch* next = nullptr;  // if it may start early
    bool early;
    std::atomic<bool> wanted{false}, ended{false}, hopeless{false};
    std::atomic<int> released{0}, idle{0};  // blocks
    std::thread thread;

    bool all(const std::atomic<int>& some) const { return some == (int)blocks.size(); }
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
    const Lanes& b = running->barriers[barrier];
    const long before = b.generation;
    arrive(barrier, count);
    until([&] { return b.generation != before; });
}
