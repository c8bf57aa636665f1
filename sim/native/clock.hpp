// The clock of an engine and of its GPU.
#pragma once

#include "step_costs.hpp"

namespace replay {

struct Clock {
    double now_s;  // of the last thing that happened
    double gpu_free_s = 0.0;
    Heat heat{};

    // A step is launched now (sim/replica.py says what the host and the GPU do side by side).
    void launch(StepRow& row, const StepCosts& costs, const Timing& timing, double stage_s = 0.0, double copy_s = 0.0) {
        double device_s = timing.device_s;
        if (costs.heat.tau_s > 0.0) {
            const double idle_s = std::max(0.0, now_s + stage_s + copy_s - gpu_free_s);
            device_s = heat.step(costs.heat, device_s, timing.heat, row.tokens, idle_s + timing.host_s);
        }
        row.device_s = device_s * costs.factor;
        row.host_s = timing.host_s * costs.factor;
        row.start_s = std::max(now_s, gpu_free_s);
        const double ready_s = std::max(now_s + stage_s + row.host_s, gpu_free_s);
        gpu_free_s = ready_s + copy_s + row.device_s;
        row.end_s = gpu_free_s;
        row.load_s = stage_s + copy_s;
        row.extrapolated = timing.extrapolated;
    }
    // When it is waited for now, it has landed then.
    double landed_s(const StepRow& row) const { return now_s + std::max(0.0, row.end_s - now_s); }
};

}  // namespace replay
