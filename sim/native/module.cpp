// Python's view of the compiled replay; sim/compiled.py is its only user.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "repeat.hpp"
#include "residency.hpp"

namespace py = pybind11;
using namespace replay;

namespace {

// A copy of `values` as a numpy array.
template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <class T, class Get>
py::array_t<T> column(const Engine& engine, Get get) {
    py::array_t<T> out(static_cast<py::ssize_t>(engine.states.size()));
    auto* to = out.mutable_data();
    for (const State& state : engine.states) *to++ = static_cast<T>(get(state));
    return out;
}

enum Status : Int { FINISHED, RUNNING, WAITING };

Int status_of(const State& s) { return s.done ? FINISHED : s.waiting ? WAITING : RUNNING; }

// One column a fact, a row a request, in the order in which they were added.
py::dict states_of(const Engine& e) {
    py::dict out;
    out["row"] = column<Int>(e, [](const State& s) { return s.row; });
    out["status"] = column<Int>(e, status_of);
    out["first_scheduled_s"] = column<double>(e, [](const State& s) { return s.first_scheduled_s; });
    out["first_token_s"] = column<double>(e, [](const State& s) { return s.first_token_s; });
    out["finish_s"] = column<double>(e, [](const State& s) { return s.finish_s; });
    out["tokens_emitted"] = column<Int>(e, [&](const State& s) { return e.scheduler.lockstep.emitted(s); });
    out["cached_tokens"] = column<Int>(e, [](const State& s) { return s.cached_tokens; });
    out["preemptions"] = column<Int>(e, [](const State& s) { return s.preemptions; });
    out["skips"] = column<Int>(e, [&](const State& s) { return e.scheduler.waiting.skips(s); });
    return out;
}

template <class States>
std::set<Int> adapters_of(const States& states) {
    std::set<Int> out;
    for (const State* state : states)
        if (state->adapter != BASE) out.insert(state->adapter);
    return out;
}

std::vector<Int> resident(const Engine& e) {
    std::vector<Int> out;
    for (std::size_t a = 1; a < e.slots.slot.size(); ++a)
        if (e.slots.slot[a] >= 0) out.push_back(static_cast<Int>(a));
    return out;
}

std::vector<Int> unfinished(const Engine& e) {
    std::vector<Int> out;
    for (std::size_t i = 0; i < e.states.size(); ++i)
        if (!e.states[i].done) out.push_back(static_cast<Int>(i));
    return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The replay's inner loop, compiled: the decisions of sim/scheduler.py, sim/kv_cache.py and sim/adapter_manager.py.";
    py::register_exception<IntegrityError>(m, "NativeIntegrityError");
    py::register_exception<LivelockError>(m, "NativeLivelockError");
    py::register_exception<AdapterError>(m, "NativeAdapterError");
    PYBIND11_NUMPY_DTYPE(StepRow, step, start_s, end_s, device_s, host_s, load_s, tokens, prefill_tokens, prefill_requests,
                         decode_requests, running, waiting, distinct_adapters, admitted, preempted, skipped, finished,
                         cached_tokens, stages, activations, evictions, used_blocks, free_blocks, extrapolated);
    PYBIND11_NUMPY_DTYPE(MoveRow, start_s, end_s, kind, adapter, slot);
    PYBIND11_NUMPY_DTYPE(Use, step_uses, hits, stages, activations, evictions);

    py::class_<Config>(m, "Config")
        .def(py::init<>())
#define KEY(name) .def_readwrite(#name, &Config::name)
        KEY(max_loras) KEY(max_cpu_loras) KEY(max_num_seqs) KEY(max_num_batched_tokens) KEY(max_model_len) KEY(block_size)
        KEY(num_gpu_blocks) KEY(long_prefill_token_threshold) KEY(watermark) KEY(enable_chunked_prefill)
        KEY(enable_prefix_caching) KEY(async_scheduling) KEY(scheduler_reserve_full_isl) KEY(priority) KEY(set_order);
#undef KEY

    py::class_<Requests, std::shared_ptr<Requests>>(m, "Requests")
        .def(py::init([](std::vector<double> arrival_s, std::vector<Int> prompt, std::vector<Int> limit,
                         std::vector<Int> adapter, std::vector<Int> priority, std::vector<Int> prefix_id,
                         std::vector<Int> prefix_tokens, std::vector<Int> parent, std::vector<Int> end_tokens, bool tree) {
            return Requests{std::move(arrival_s), std::move(prompt), std::move(limit), std::move(adapter),
                            std::move(priority), std::move(prefix_id), std::move(prefix_tokens), std::move(parent),
                            std::move(end_tokens), tree};
        }));

    py::class_<Adapters, std::shared_ptr<Adapters>>(m, "Adapters")
        .def(py::init([](std::vector<Int> rank, std::vector<Int> order, std::vector<double> stage_s,
                         std::vector<double> load_s) {
            return Adapters{std::move(rank), std::move(order), std::move(stage_s), std::move(load_s)};
        }));

    py::class_<StepCosts, std::shared_ptr<StepCosts>>(m, "StepCosts")
        .def(py::init([](std::vector<Int> graph_sizes, std::array<Int, 10> sizes, std::vector<Int> bands, double factor, double tau_s,
                         double spare) {
            StepCosts costs;
            costs.graph_sizes = std::move(graph_sizes);
            costs.sizes = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]};
            costs.bands = std::move(bands);
            costs.factor = factor;
            costs.heat = {tau_s, spare};
            return costs;
        }))
        .def("regime", [](StepCosts& costs, const std::string& name, std::vector<double> knots,
                          std::vector<double> lora_knots, std::vector<double> device, std::vector<double> host,
                          std::vector<double> launch, std::array<double, BOUNDED> low, std::array<double, BOUNDED> high,
                          Int lora_rows, double heat, std::vector<double> bands) {
            auto& regime = name == "eager" ? costs.eager : name == "decode" ? costs.decode : name == "long" ? costs.longer : costs.mixed;
            regime = Regime{std::move(knots), std::move(lora_knots), std::move(device), std::move(host),
                            std::move(launch), low, high, lora_rows, heat, std::move(bands)};
        });

    py::class_<Engine>(m, "Engine")
        .def(py::init<Config, std::shared_ptr<Requests>, std::shared_ptr<Adapters>, std::shared_ptr<StepCosts>,
                      const std::vector<Int>&, const std::vector<Int>&, Int, double>())
        .def("add", &Engine::add)
        .def("advance", &Engine::advance)
        .def("look", &Engine::look)
        .def("next_s", &Engine::next_s)
        .def("idle", &Engine::idle)
        .def_property_readonly("now_s", [](const Engine& e) { return e.clock.now_s; })
        .def_readonly("finished", &Engine::finished)
        .def("running", [](const Engine& e) { return e.scheduler.running.size(); })
        .def("waiting", [](const Engine& e) { return e.scheduler.waiting.all.size(); })
        .def("used_blocks", [](const Engine& e) { return e.scheduler.pool.used(); })
        .def("free_blocks", [](const Engine& e) { return e.scheduler.pool.free(); })
        .def("looked_at", [](const Engine& e) { return e.scheduler.looked_at; })
        .def("resident", &resident)
        .def("running_adapters", [](const Engine& e) { return adapters_of(e.scheduler.running); })
        .def("waiting_adapters", [](const Engine& e) { return adapters_of(e.scheduler.waiting.all); })
        .def("unfinished", &unfinished)
        .def("states", &states_of)
        .def("state", [](const Engine& e, std::size_t i) {
            const State& s = e.states.at(i);
            return py::make_tuple(s.first_token_s, s.finish_s, e.scheduler.lockstep.emitted(s), s.preemptions, e.scheduler.waiting.skips(s));
        })
        .def("uses", [](const Engine& e) { return array_of(e.adapter_uses()); })
        .def("rows", [](const Engine& e) { return array_of(e.rows); })
        .def("moves", [](const Engine& e) { return array_of(e.moves); })
        .def("forget_rows", [](Engine& e) {
            e.rows.clear();
            e.moves.clear();
        })
        .def("totals", [](const Engine& e) {
            const Totals& t = e.totals;
            return py::make_tuple(t.steps, t.extrapolated, t.stages, t.running, t.busy_s, t.load_s, t.usage_s, t.max_usage);
        });
}
