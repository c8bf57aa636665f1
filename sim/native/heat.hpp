// How hard a GPU worked just now: backend/heat.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "records.hpp"

namespace replay {

struct HeatCurve { double tau_s = 0.0, spare = 0.0; };  // `tau_s` 0: nothing is known of heat

struct Heat {
    double level = 0.0;

    // Seconds of a step after a rest (`Heat.step`).
    double step(const HeatCurve& curve, double cool_s, double slope, Int tokens, double rest_s) {
        const double tau_s = curve.tau_s;
        level *= std::exp(-rest_s / tau_s);
        const double device_s = cool_s * (1.0 + slope * std::max(0.0, level - curve.spare));
        const double rate = device_s > 0.0 ? 1e-3 * static_cast<double>(tokens) / device_s : 0.0, to = rate * rate;
        level = to + (level - to) * std::exp(-device_s / tau_s);
        return device_s;
    }
};

}  // namespace replay
