// What the compiled replay keeps: requests while they live, and the rows a run leaves behind.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace replay {

using Int = std::int64_t;
constexpr Int BASE = 0;
constexpr double NEVER = std::numeric_limits<double>::quiet_NaN();

// Errors that Python translates into the exceptions of sim/errors.py.
struct IntegrityError : std::runtime_error { using std::runtime_error::runtime_error; };
struct LivelockError : std::runtime_error { using std::runtime_error::runtime_error; };
struct AdapterError : std::runtime_error { using std::runtime_error::runtime_error; };

// sim/config.py, EngineConfig, as far as the replay knows it.
struct Config {
    Int max_loras, max_cpu_loras, max_num_seqs, max_num_batched_tokens, max_model_len, block_size, num_gpu_blocks;
    Int long_prefill_token_threshold;
    double watermark;
    bool enable_chunked_prefill, enable_prefix_caching, async_scheduling, scheduler_reserve_full_isl, priority, set_order;
};

// The columns of workloads.requests.RequestTable; `limit`: output tokens after which a request ends.
struct Requests {
    std::vector<double> arrival_s;
    std::vector<Int> prompt_tokens, limit, adapter, priority, prefix_id, prefix_tokens, parent, end_tokens;
    bool tree = false;

    // RequestTable.prefix: (end_tokens, id) pairs with rising ends.
    std::vector<std::pair<Int, Int>> prefix(Int row) const {
        std::vector<std::pair<Int, Int>> path;
        const Int tokens = prefix_tokens[row];
        if (prefix_id[row] < 0 || tokens == 0) return path;
        if (!tree) return {{tokens, prefix_id[row]}};
        std::vector<std::pair<Int, Int>> upward;
        for (Int node = prefix_id[row]; node >= 0; node = parent[node]) upward.emplace_back(end_tokens[node], node);
        for (auto pair = upward.rbegin(); pair != upward.rend(); ++pair) {
            if (pair->first >= tokens) {
                path.emplace_back(tokens, pair->second);
                break;
            }
            path.push_back(*pair);
        }
        return path;
    }
};

// By adapter id, entry 0 unused: what moves take, and where a set of adapters is walked (`lora_order`).
struct Adapters {
    std::vector<Int> rank, order;
    std::vector<double> stage_s, load_s;
    Int count() const { return static_cast<Int>(rank.size()) - 1; }
};

// With prefix caching: what of a request others may find, or itself when it comes back after a preemption.
struct Findable {
    std::vector<std::pair<Int, Int>> prefix;  // its common beginning: (end, id) with rising ends
    std::vector<int> blocks;                  // those that it holds, its first ones
    std::vector<int> own;                     // by index past the common beginning: the oldest copy, or -1
};

// sim/state.py, RequestState. Where it decodes in lockstep, what it has come to is counted from then on (lockstep.hpp).
struct State {
    Int row, prompt, limit, adapter, priority;
    double arrival_s;
    Int computed = 0, emitted = 0, placeholders = 0, held = 0, registered = 0;
    Int joined = NOT_JOINED;                    // the plan after which it decodes in lockstep
    Int last = 0;                               // in lockstep: the plan that samples its last token
    Int seat = 0;                               // those that run do so in the order of their seats
    State *before = nullptr, *after = nullptr;  // its neighbours among them
    double first_token_s = NEVER;
    bool preempted = false, done = false, waiting = true;
    Int preemptions = 0, skips = 0, cached_tokens = 0, place = 0, passes = 0;
    double first_scheduled_s = NEVER, finish_s = NEVER;
    std::unique_ptr<Findable> findable;

    static constexpr Int NOT_JOINED = -1;
    bool in_lockstep() const { return joined != NOT_JOINED; }
    Int tokens() const { return prompt + emitted; }
};

inline bool by_seat(const State* a, const State* b) { return a->seat < b->seat; }

// sim/tables.py, StepRow.
struct StepRow {
    Int step;
    double start_s, end_s, device_s, host_s, load_s;
    Int tokens, prefill_tokens, prefill_requests, decode_requests, running, waiting, distinct_adapters, admitted, preempted,
        skipped, finished, cached_tokens, stages, activations, evictions, used_blocks, free_blocks;
    std::uint8_t extrapolated;
};

// sim/tables.py, MoveRow; `kind` is an index into the kinds that Python names.
struct MoveRow {
    double start_s, end_s;
    Int kind, adapter, slot;
};

// sim/tables.py, StepTotals: added up in the order of the steps.
struct Totals {
    Int steps = 0, extrapolated = 0, stages = 0, running = 0;
    double busy_s = 0, load_s = 0, usage_s = 0, max_usage = 0;

    void add(const StepRow& row) {
        const Int blocks = row.used_blocks + row.free_blocks;
        const double length = row.end_s - row.start_s;
        const double usage = static_cast<double>(row.used_blocks) / static_cast<double>(blocks > 1 ? blocks : 1);
        steps += 1;
        extrapolated += row.extrapolated;
        stages += row.stages;
        running += row.running;
        busy_s += length;
        load_s += row.load_s;
        usage_s += usage * length;
        if (usage > max_usage) max_usage = usage;
    }
};

// sim/tables.py, AdapterUse.
struct Use { Int step_uses = 0, hits = 0, stages = 0, activations = 0, evictions = 0; };

}  // namespace replay
