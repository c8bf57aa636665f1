// What a step costs: backend/predictor.py, Predictor.
// Sums are taken in the order in which Python takes them, so that both give the same bits.
#pragma once

#include <array>
#include <optional>

#include "features.hpp"
#include "heat.hpp"

namespace replay {

constexpr int REST = 14;    // terms of backend/predictor.py, TERMS, but for the first two
constexpr int BOUNDED = 7;  // backend/predictor.py, BOUNDED
constexpr int BAND = 4;     // backend/predictor.py, BAND_TERMS

struct Regime {
    std::vector<double> knots, lora_knots, device, host, launch;
    std::array<double, BOUNDED> low, high;
    Int lora_rows = 1;
    double heat = 0.0;
    std::vector<double> bands;
};

// Of a step on a rested GPU, and by what share of itself it takes longer for each unit of heat that tells.
struct Timing { double device_s, host_s; bool extrapolated; double heat; };

class StepCosts {
  public:
    std::vector<Int> graph_sizes;
    std::optional<Regime> eager, decode, mixed, longer;
    FeatureSizes sizes{};
    std::vector<Int> bands;  // backend/predictor.py, BANDS
    double factor = 1.0;  // of all steps, for a what-if
    HeatCurve heat{};

    Timing predict(const Features& f) const {
        Int size = f.rows;
        const Regime& r = regime(f, size);
        double device = device_s(r, f, size);
        const double host = host_s(r.host, f);
        if (!r.launch.empty()) device = std::max(device, host_s(r.launch, f));
        return {device, host, !contains(r, f), r.heat};
    }

    // Decodes that are alike but for their contexts, which all grow by a token a step: what of their cost stays is added up once.
    // Only the first of them may follow a step with prompts.
    class Decodes {
      public:
        Decodes(const StepCosts& costs, const Features& f) : f_(f) {
            Int size = f.rows;
            regime_ = &costs.regime(f, size);
            tail_tokens_ = f.decodes > costs.sizes.split_decodes ? std::max<Int>(0, costs.sizes.filling_decodes - f.decodes) : 0;
            const double* c = costs.hats_s(*regime_, f, size, base_);
            kv_ = c[0];
            tail_ = c[1];
            const auto rest = rest_of(f, size, costs.sizes);
            for (std::size_t i = 0; i < rest.size(); ++i)
                if (const double product = c[2 + i] * static_cast<double>(rest[i]); product != 0.0) rest_[count_++] = product;
            band_ = costs.band_s(*regime_, f, size);
            add_up_host();
        }
        // Of one step; the next one has a token more in every context.
        Timing next() {
            double device = base_;
            device += kv_ * static_cast<double>(f_.kv_tokens);
            device += tail_ * static_cast<double>(f_.kv_tail + tail_tokens_ * f_.max_kv);
            for (int i = 0; i < count_; ++i) device += rest_[i];
            device += band_;
            if (!regime_->launch.empty()) device = std::max(device, launch_);
            const Timing timing{device, host_, !contains(*regime_, f_), regime_->heat};
            f_.kv_tokens += f_.requests;
            f_.max_kv += 1;
            if (f_.after_prompts) {
                f_.after_prompts = false;
                add_up_host();
            }
            return timing;
        }

      private:
        void add_up_host() {
            host_ = host_s(regime_->host, f_);
            launch_ = regime_->launch.empty() ? 0.0 : host_s(regime_->launch, f_);
        }
        Features f_;
        const Regime* regime_;
        Int tail_tokens_;
        double base_ = 0.0, kv_, tail_, band_, host_, launch_;
        double rest_[REST];
        int count_ = 0;
    };

  private:
    const Regime& regime(const Features& f, Int& size) const {
        if (graph_sizes.empty() || f.rows > graph_sizes.back()) return *eager;
        size = *std::lower_bound(graph_sizes.begin(), graph_sizes.end(), f.rows);
        const std::optional<Regime>& captured = f.decode_only ? decode : size > sizes.long_rows && longer ? longer : mixed;
        return captured ? *captured : *eager;
    }

    static void hat(double& total, Int value, const std::vector<double>& knots, const double* c) {
        const auto v = static_cast<double>(value);
        if (knots.size() == 1 || v <= knots[0]) {
            total += c[0] * 1.0;
            return;
        }
        const auto at = std::lower_bound(knots.begin(), knots.end(), v) - knots.begin();
        const auto right = std::min<std::ptrdiff_t>(at, static_cast<std::ptrdiff_t>(knots.size()) - 1), left = right - 1;
        const double share = (v - knots[left]) / (knots[right] - knots[left]);
        total += c[left] * (1.0 - share);
        total += c[right] * share;
    }

    // Adds what goes by rows to `total`, and returns the coefficients of the other terms.
    const double* hats_s(const Regime& r, const Features& f, Int size, double& total) const {
        const double* c = r.device.data();
        hat(total, size, r.knots, c);
        c += r.knots.size();
        if (f.active_adapters) hat(total, (size + r.lora_rows - 1) / r.lora_rows * r.lora_rows, r.lora_knots, c);
        return c + r.lora_knots.size();
    }

    // The terms (backend/predictor.py, TERMS) after the first two, which grow with every decode.
    static std::array<Int, REST> rest_of(const Features& f, Int size, const FeatureSizes& sizes) {
        const Int slot_tiles = (f.idle_slots + f.active_adapters) * ((size + sizes.grid_rows - 1) / sizes.grid_rows);
        const Int wide_adapters = size >= sizes.wide_rows ? f.active_adapters : 0;
        const Int prompt_rows = f.active_adapters ? f.rows - f.decodes : 0;
        return {f.prefill_keys, f.prefill_tail, f.requests, f.active_adapters, f.rank_sum, f.max_rank, f.lora_tiles,
                f.row_rank, f.idle_slots, slot_tiles, wide_adapters, prompt_rows,
                f.max_rank * f.rows, f.decodes > 0 && !f.decode_only ? 1 : 0};
    }

    double device_s(const Regime& r, const Features& f, Int size) const {
        double total = 0.0;
        const double* c = hats_s(r, f, size, total);
        const Int idle = f.decodes > sizes.split_decodes ? std::max<Int>(0, sizes.filling_decodes - f.decodes) * f.max_kv : 0;
        total += *c++ * static_cast<double>(f.kv_tokens);
        total += *c++ * static_cast<double>(f.kv_tail + idle);
        for (Int term : rest_of(f, size, sizes)) total += *c++ * static_cast<double>(term);
        return total + band_s(r, f, size);
    }

    // What adapters cost more in this band than in all.
    double band_s(const Regime& r, const Features& f, Int size) const {
        if (r.bands.empty() || !f.active_adapters) return 0.0;
        const double* c = r.bands.data() + BAND * (std::lower_bound(bands.begin(), bands.end(), size) - bands.begin());
        double total = 0.0;
        for (Int term : {f.active_adapters, f.rank_sum, f.row_rank, f.max_rank * f.active_adapters}) total += *c++ * static_cast<double>(term);
        return total;
    }

    static double host_s(const std::vector<double>& c, const Features& f) {
        double total = 0.0;
        total += c[0] * 1.0;
        total += c[1] * (f.active_adapters ? 1.0 : 0.0);
        total += c[2] * (f.after_prompts ? 1.0 : 0.0);
        total += c[3] * static_cast<double>(f.requests);
        total += c[4] * static_cast<double>(f.active_adapters);
        total += c[5] * static_cast<double>(f.rows);
        total += c[6] * static_cast<double>(f.skipped);
        return total;
    }

    static bool contains(const Regime& r, const Features& f) {
        const Int values[BOUNDED] = {f.rows, f.kv_tokens, f.max_kv, f.prefill_keys, f.active_adapters, f.rank_sum, f.row_rank};
        for (int i = 0; i < BOUNDED; ++i)
            if (!(r.low[i] <= static_cast<double>(values[i]) && static_cast<double>(values[i]) <= r.high[i])) return false;
        return true;
    }
};

}  // namespace replay
