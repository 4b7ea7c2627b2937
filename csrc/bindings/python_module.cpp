// recycle_ext._C: what Python needs beside the ops on tensors. Loading the module also registers these ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/bandwidth.h"
#include "../cpu/cores.h"
#include "../cpu/kernels.h"
#include "../cpu/memory.h"
#include "build_info.h"
#include "recycle/decode_step.h"
#include "recycle/model.h"
#include "recycle/parallel.h"
#include "recycle/profile.h"
#include "threads.h"
#include "weights.h"

namespace py = pybind11;

using recycle::bindings::Buffer;
using recycle::bindings::check_n_threads;

namespace {

int64_t scratch_bytes(const py::buffer& plan, const py::buffer& weights, int64_t batch, int64_t num_draft_tokens,
                      bool greedy, int n_threads) {
  const Buffer table(plan, false);
  const Buffer bytes(weights, false);
  recycle::Model model;
  const char* error = recycle::read_plan(static_cast<const int64_t*>(table.info.ptr), table.bytes / 8,
                                         static_cast<const std::byte*>(bytes.info.ptr), bytes.bytes, &model);
  if (error != nullptr) throw std::invalid_argument(std::string("plan and weights: ") + error);
  const int64_t needed =
      recycle::decode_scratch_bytes(model, batch, num_draft_tokens, greedy, check_n_threads(n_threads));
  return (needed + n_threads - 1) / n_threads;
}

std::vector<std::string> runnable_isas() {
  const char* names[recycle::kMaxIsas];
  const int count = recycle::runnable_isas(names);
  return {names, names + count};
}

// The build, instruction sets and the profile.
void bind_process(py::module_& m) {
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = RECYCLE_TORCH_VERSION;
        info["cpu_targets"] = RECYCLE_CPU_TARGETS;
        info["cuda"] = RECYCLE_CUDA_STATUS;
        info["compiler"] = RECYCLE_COMPILER;
        info["version"] = RECYCLE_VERSION;
        return info;
      },
      "The build: version, torch, cpu_targets, cuda, compiler.");

  m.def("isa", [] { return recycle::kernels().name; }, "The instruction set in use.");
  m.def("runnable_isas", &runnable_isas, "Instruction sets that this build has and this processor can run, best last.");
  m.def(
      "force_isa",
      [](std::optional<std::string> name) {
        if (!recycle::force_isa(name ? name->c_str() : nullptr))
          throw std::invalid_argument("instruction set " + *name + " is not in this build or not in this processor");
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("name"),
      "Use the kernels of this instruction set; None: of the best one.");
  m.def("profile", &recycle::profile, py::call_guard<py::gil_scoped_release>(), py::arg("on"),
        "Starts to add up the time of each phase of the kernels, from zero, or stops.");
  m.def(
      "phase_times",
      [] {
        py::list rows;
        for (const bool is_module : {false, true})
          for (int i = 0; i < recycle::kPhases; ++i) {
            const auto phase = static_cast<recycle::Phase>(i);
            const recycle::PhaseTime time = [&] {
              const py::gil_scoped_release release;
              return recycle::phase_time(phase, is_module);
            }();
            if (time.count > 0)
              rows.append(py::make_tuple(is_module ? "module" : "base", recycle::phase_name(phase), time.count,
                                         time.work, time.wait));
          }
        return rows;
      },
      "The profile: (part, phase, times run, seconds of work, seconds of waiting), mean over the "
      "threads.");
}

// Threads, and the cores for them.
void bind_threads(py::module_& m) {
  m.def("n_threads", &recycle::bindings::n_threads,
        "Threads of calls and models without a number of their own: what set_n_threads has set, else one for each "
        "physical core of this process, within the CPU quota, and at most torch's number.");
  m.def(
      "set_n_threads", [](std::optional<int> n) { recycle::bindings::set_n_threads(n ? check_n_threads(*n) : 0); },
      py::arg("n"), "Sets n_threads for the calls and decoders that follow; None: the default again.");
  m.def("available_cores", &recycle::available_cores, "CPUs that this process may run on (its affinity mask).");
  m.def(
      "physical_cores", [](const std::string& root) { return recycle::physical_cores(recycle::process_cpus(), root); },
      py::arg("root") = "", "Those of them that are no second hyperthread of a core. root: where /sys is.");
  m.def(
      "cpu_quota",
      [](const std::string& root) -> std::optional<double> {
        const double quota = recycle::cpu_quota(root);
        return std::isinf(quota) ? std::nullopt : std::optional(quota);
      },
      py::arg("root") = "",
      "CPUs' worth of time that the process's control groups allow it; None without a limit. root: where /proc and "
      "/sys are.");
}

// Scratch and memory.
void bind_memory(py::module_& m) {
  m.def(
      "available_memory",
      [](const std::string& root) -> std::optional<int64_t> {
        const int64_t bytes = recycle::available_memory(root);
        return bytes < 0 ? std::nullopt : std::optional(bytes);
      },
      py::arg("root") = "",
      "Bytes that this process can still allocate, within its control groups; None where the system does not say. "
      "root: where /proc and /sys are.");

  m.def(
      "read_bandwidth",
      [](int64_t bytes, int repeats) {
        return recycle::read_bandwidth(bytes, repeats, recycle::bindings::n_threads());
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("bytes"), py::arg("repeats"),
      "Bytes a second that all threads together read from a buffer of this size: the median of "
      "the repeats.");

  m.def("scratch_bytes", &scratch_bytes, py::arg("plan"), py::arg("weights"), py::arg("batch"), py::arg("drafts"),
        py::arg("greedy"), py::arg("threads"),
        "Bytes of a row of scratch [threads, bytes], which decode_step and prefill need to run on that many threads.");
  m.def("positions_needed", &recycle::positions_needed, py::arg("drafts"),
        "Free positions that the caches must have for a decode step with this many draft tokens.");
  m.attr("PLAN_MAGIC") = recycle::kPlanMagic;
  m.attr("PLAN_VERSION") = recycle::kPlanVersion;
  m.attr("MAX_DRAFTS") = recycle::kMaxDraftTokens;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native parts of recycle_ext; importing this module registers torch.ops.recycle.*";
  bind_process(m);
  bind_threads(m);
  bind_memory(m);
  recycle::bindings::bind_weights(m);
}
