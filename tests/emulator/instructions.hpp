// What kernels ask of every GPU: meeting, exchanging within a warp, copying, rounding, tensor cores.

template <int ID>
void meet(int threads) { meet_at(ID, threads); }
inline void arrive_at(int barrier) { arrive(barrier, blockDim.x); }
inline void wait_at(int barrier) { meet_at(barrier, blockDim.x); }
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

inline void wait_for_previous() {
    until([] { return !running->launch->previous || running->launch->previous->ended; });
}
inline void release(Fiber& fiber) {
    if (fiber.released) return;
    fiber.released = true;
    for (const Fiber& other : running->fibers)
        if (!other.released) return;
    running->launch->released++;
}
inline void let_next_start() {
    release(*running->current);
    until([] {
        const Launch& mine = *running->launch;
        return mine.all(mine.released) && (!mine.next || mine.next->all(mine.next->idle));
    });
}
inline u32 read_now(const u32* at) { give_way(); return __atomic_load_n(at, __ATOMIC_RELAXED); }
inline void add_now(u32* at, u32 v) { __atomic_fetch_add(at, v, __ATOMIC_RELAXED); }
inline float2 peek(const float* cell) { return {__uint_as_float(read_now((const u32*)cell)), __uint_as_float(read_now((const u32*)cell + 1))}; }
inline long long computed_here(long long v) { return v; }
inline void hand_over(float* cell, float v) { __atomic_store_n((u32*)cell, __float_as_uint(v), __ATOMIC_RELAXED); }
inline uint4 load_weight(const u16* p) { uint4 v; memcpy(&v, p, 16); return v; }
inline uint4 load_row(const u16* p) { return load_weight(p); }
inline void copy_async(void* to, const void* from, bool valid) { running->current->copies.push_back({to, valid ? from : nullptr}); }
inline void commit_copies() {
    running->current->committed.push_back(std::move(running->current->copies));
    running->current->copies.clear();
}
template <int LEFT>
void wait_for_copies() {
    for (auto& groups = running->current->committed; groups.size() > LEFT; groups.pop_front())
        for (const Copy& copy : groups.front())
            copy.from ? (void)memcpy(copy.to, copy.from, 16) : (void)memset(copy.to, 0, 16);
}

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
inline float exp2_of(float x) { return exp2f(x); }
inline float inverse(float x) { return 1.f / x; }
inline float arithmetic(float f) { return f == f ? f : __uint_as_float(0x7fffffff); }  // its NaN

inline uint4 load_transposed(const u16* eight) {
    struct { const u16* eight; u32 out[4]; } mine{eight};
    in_warp(mine, [](auto** all) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                const int row = i * 8 + lane % 4 * 2, column = lane / 4;
                all[lane]->out[i] = all[row]->eight[column] | (u32)all[row + 1]->eight[column] << 16;
            }
    });
    return {mine.out[0], mine.out[1], mine.out[2], mine.out[3]};
}

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
