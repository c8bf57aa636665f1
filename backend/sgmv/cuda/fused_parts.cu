// What the base products share that add LoRA's part themselves: warps of their own do a share of the shrink, unless it comes
// before, then compute B h of the adapted rows, while others stream the base weights. It is added to the rounded sums, so that the
// bits are those of the base product, `shrink` and `expand` one after the other.

#define NO_DELTA (-0.f)  // adding it changes no bit

// What `expand` makes of a base product that was rounded when it was written.
static __device__ __forceinline__ float plus(float base, float delta, float scale) {
    return fmaf(delta, scale, widen(pack(base, 0.f), 0));
}

static __device__ __forceinline__ int slice_of(const Expand& p, int column) {
    int slice = 0;
    while (slice + 1 < p.slices && column >= p.begin[slice + 1]) slice++;
    return slice;
}

// The segments of at most N rows in shared memory, and the rank vectors of every sorted position.
template <int N, int HELPERS>
struct Adapted {
    int4 found[N];    // as in the segments: slot, first position, rows, rank
    int4 tiles[N];    // high ranks first, so that warps that take them in turn have as much to do
    int rows[N];      // of each position
    int ranks[N];     // of each position
    float scales[N];  // of each row
    bool mine[N];     // whether this block of its cluster finishes a row

    // One trip to memory, before the predecessor has completed: segments are older. How many tiles, and their largest rank.
    __device__ __forceinline__ int2 load(const Expand& p, const int* row_slots, int count, int thread, int rank, int size) {
        const int2 header = *(const int2*)p.header;
        if (thread < count) {
            const int4 tile = p.tiles[thread];  // of no meaning past the last
            const int row = p.rows[thread], slot = row_slots[thread];
            found[thread] = tile, rows[thread] = row, ranks[thread] = 0, scales[thread] = 1.f;
            mine[thread] = thread % size == rank && slot < 0;
        }
        meet<3>(HELPERS);
        return header;
    }

    // Items are dealt to blocks `deal` at a time.
    __device__ __forceinline__ void sort(const Expand& p, int count, int eights, int thread, int deal, int rank, int size) {
        if (thread < count) {
            const int4 tile = found[thread];
            const float scale = p.scaling[tile.x];
            int t = 0;
            for (int other = 0; other < count; other++) {
                const int rank = found[other].w;
                t += rank > tile.w || (rank == tile.w && other < thread);
            }
            tiles[t] = tile;
            for (int i = 0; i < tile.z; i++) {
                ranks[tile.y + i] = tile.w;
                scales[rows[tile.y + i]] = scale;
                mine[rows[tile.y + i]] = (t * eights + i / 8) / deal % size == rank;
            }
        }
        meet<3>(HELPERS);
    }

    // h [count][h_rank + 4]: pairs of ranks, the leading parts before the rests; partials, as soon as they are there, are added
    // in order, then split into two numbers of the weights' type. `most`: the largest rank.
    template <bool WAITS>
    __device__ __forceinline__ void gather(const Expand& p, const float* filled, int most, u32* h, int count, int slice,
                                           int thread) const {
        const int pairs = (most + 15) / 16 * 8, all = count * pairs;
        if (all <= HELPERS)
            gather_pairs<1, 8, WAITS>(p, filled, pairs, all, h, slice, thread);
        else
            gather_pairs<4, 4, WAITS>(p, filled, pairs, all, h, slice, thread);
        meet<3>(HELPERS);
    }

    // PAIRS at a time of a thread, PIECES partials of each.
    template <int PAIRS, int PIECES, bool WAITS>
    __device__ __forceinline__ void gather_pairs(const Expand& p, const float* filled, int pairs, int all, u32* h, int slice,
                                                 int thread) const {
        const long long step = (long long)p.h_rows * p.slices * p.h_rank;
        for (int start = thread; start < all; start += PAIRS * HELPERS) {
            const float* from[PAIRS];
            float low[PAIRS], high[PAIRS];
            int left[PAIRS];  // ranks from the pair's first on; cells past them are never written
#pragma unroll
            for (int u = 0; u < PAIRS; u++) {
                const int i = min(start + u * HELPERS, all - 1), at = i / pairs, pair = i % pairs;
                from[u] = filled + ((long long)at * p.slices + slice) * p.h_rank + 2 * pair;
                left[u] = start + u * HELPERS < all ? ranks[at] - 2 * pair : 0;
                low[u] = high[u] = 0.f;
            }
            for (int first = 0; first < p.pieces; first += PIECES) {
                float2 v[PIECES][PAIRS];
                bool missing = true;
                while (missing) {  // again all of them, on their way together
                    const long long each = WAITS ? computed_here(step) : step;
#pragma unroll
                    for (int n = 0; n < PIECES * PAIRS; n++) {
                        const int piece = first + n / PAIRS, u = n % PAIRS;
                        v[n / PAIRS][u] = piece < p.pieces && left[u] > 0 ? peek(from[u] + piece * each) : make_float2(0.f, 0.f);
                    }
                    missing = false;
#pragma unroll
                    for (int n = 0; n < PIECES * PAIRS; n++) {
                        const float2& part = v[n / PAIRS][n % PAIRS];
                        missing |= WAITS && (empty(part.x) || (left[n % PAIRS] > 1 && empty(part.y)));
                    }
                }
#pragma unroll
                for (int n = 0; n < PIECES * PAIRS; n++) {
                    const float2& part = v[n / PAIRS][n % PAIRS];
                    low[n % PAIRS] += part.x, high[n % PAIRS] += part.y;
                }
            }
#pragma unroll
            for (int u = 0; u < PAIRS; u++) {
                const int i = start + u * HELPERS;
                if (i >= all) continue;
                const float a = left[u] > 0 ? low[u] : 0.f, b = left[u] > 1 ? high[u] : 0.f;
                const u32 value = pack(a, b);
                u32* to = h + i / pairs * (p.h_rank + 4) + i % pairs;
                to[0] = value, to[p.h_rank / 2] = pack(a - widen(value, 0), b - widen(value, 1));
            }
        }
    }
};

// At most eight rows of one adapter. Items count the eights of a tile first.
struct Item {
    int index, first, block;
    int4 tile;
    bool valid;

    __device__ __forceinline__ void seek(const int4* tiles, int items, int eights, int from, int by) {
        block = 0;
        for (index = from; index < items; index += by) {
            tile = tiles[eights == 1 ? index : index / eights];
            first = eights == 1 ? 0 : index % eights * 8;
            if (first < tile.z) break;
        }
        valid = index < items;
    }

    // A lane's mma fragment of its sixteen ranks.
    __device__ __forceinline__ uint4 fragment(const u32* h, int h_rank, int g, int q) const {
        const u32* at = h + (tile.y + min(first + g, tile.z - 1)) * (h_rank + 4) + block * 8 + q;
        return make_uint4(at[0], at[4], at[h_rank / 2], at[h_rank / 2 + 4]);
    }
};
