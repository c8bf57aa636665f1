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
    running->boxes.push_back([=, &map] {
        for (int r = 0; r < map.box_rows; r++)
            for (int i = 0; i < 64; i++) {
                const long long at = column + i, line = row + r;
                u16 v = 0;
                if (at < map.width && line < map.rows) memcpy(&v, map.address + line * map.stride_bytes + at * 2, 2);
                ((u16*)to)[r * 64 + (i / 8 ^ (r & 7)) * 8 + i % 8] = v;
            }
        ((Phase*)barrier)->bytes -= map.box_rows * 128;
        settle_phase(*(Phase*)barrier);
    });
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
