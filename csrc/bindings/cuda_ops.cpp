// The ops on a GPU: checks, and the calls to csrc/cuda. In a library of its own, which recycle_ext loads where torch
// has CUDA; the schemas are in ops.cpp. Nothing here waits for the GPU, so that a user's CUDA graph can hold it:
// what stands in the GPU's memory (lengths, tokens) the kernels check themselves, see csrc/cuda/select.h.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "check_arguments.h"
#include "device_info.h"
#include "ops.h"
#include "recycle/format.h"

namespace recycle::bindings {

namespace {

using cuda::Device;
using cuda::OnGpu;

using StreamOf = int32_t (*)(int32_t, void**);

// Found at run time: a CPU build of torch, which this may be linked against, lacks it. In a CUDA build it is in a
// library that Python loads for itself alone, so it must be asked for by the library's name.
StreamOf stream_function() {
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
  void* at = dlsym(RTLD_DEFAULT, name);
  if (at == nullptr)
    if (void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
      at = dlsym(torch_cuda, name);
  return reinterpret_cast<StreamOf>(at);
}

// The stream torch works in.
void* current_stream(const char* op, int gpu) {
  static const StreamOf function = stream_function();
  void* stream = nullptr;
  if (function == nullptr || function(gpu, &stream) != 0)
    fail(op, "this torch can't say which CUDA stream it works in");
  return stream;
}

// The GPU of the tensor that says where all of them must be.
Place place_of(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda()) fail(op, name, " must be on the GPU of the other tensors");
  return {static_cast<int>(tensor.get_device_index())};
}

Device device_of(const char* op, Place place) {
  Device device;
  if (!cuda::describe(place.gpu, &device)) fail(op, "there is no GPU cuda:", place.gpu);
  return device;
}

void check_started(const char* op, bool started) {
  if (!started)
    throw std::runtime_error(std::string(op) +
                             ": a CUDA kernel didn't start: " + cuda::last_error());
}

// What the kernels ask of a cache beyond what the CPU's do.
void check_gpu_cache(const char* op, const char* name, const Tensor& cache, int64_t head_dim,
                     const Device& device) {
  const CacheType type = cache_type(op, name, cache);
  if (type == CacheType::q8) fail(op, name, " is int8; on a GPU it must be float32 or bfloat16");
  if (reinterpret_cast<uintptr_t>(cache.const_data_ptr()) % 16 != 0)
    fail(op, name, " must begin at an address that is a multiple of 16 (fresh torch tensors do)");
  const int64_t bytes = cuda::attention_shared_bytes(type, head_dim);
  if (bytes > device.shared_bytes)
    fail(op, name, " of this dtype with head_dim ", head_dim, " needs ", bytes,
         " bytes of shared memory, and this GPU has ", device.shared_bytes,
         type == CacheType::f32 ? "; in bfloat16 it needs half" : "");
}

Tensor attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache,
                        const Tensor& lengths, const Tensor& inv_freq,
                        const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                        double eps) {
  constexpr const char* op = "attention_decode";
  const Place place = place_of(op, "q", q);
  AttentionParams params =
      check_attention(op, q, k, v, cache, lengths, inv_freq, q_norm, k_norm, eps, place);
  const Device device = device_of(op, place);
  check_gpu_cache(op, "cache", cache, params.head_dim, device);
  const OnGpu on(place.gpu);
  Tensor out = torch::stable::empty_like(q);
  params.out = data<float>(out);
  const Tensor scratch =
      torch::stable::new_empty(q, {cuda::attention_scratch_bytes(params)}, ScalarType::Byte);
  params.scratch = data<std::byte>(scratch);
  check_started(op, cuda::attention_decode(params, device, current_stream(op, place.gpu)));
  return out;
}

std::tuple<Tensor, Tensor> recycle_head(const Tensor& hidden, const std::optional<Tensor>& norm,
                                        double eps, const Tensor& head, int64_t format,
                                        int64_t n_vocab, const Tensor& positions,
                                        double temperature, int64_t top_k, double top_p,
                                        const Tensor& seeds) {
  constexpr const char* op = "recycle_head";
  const Place place = place_of(op, "hidden", hidden);
  HeadParams params = check_head(op, hidden, norm, eps, head, format, n_vocab, positions,
                                 temperature, top_k, top_p, seeds, place);
  const Device device = device_of(op, place);
  const OnGpu on(place.gpu);
  Tensor tokens = torch::stable::new_empty(hidden, {params.n_rows}, ScalarType::Long);
  Tensor log_probs = torch::stable::new_empty(hidden, {params.n_rows});
  params.tokens = data<int64_t>(tokens);
  params.log_probs = data<float>(log_probs);
  const Tensor scratch = torch::stable::new_empty(
      hidden, {cuda::head_scratch_bytes(params, device)}, ScalarType::Byte);
  params.scratch = data<std::byte>(scratch);
  check_started(op, cuda::recycle_head(params, device, current_stream(op, place.gpu)));
  return {tokens, log_probs};
}

// A step of all sequences (first_of -1), or the end of a sequence's prefill.
std::tuple<Tensor, Tensor> step(const char* op, const Tensor& weights, const Tensor& plan,
                                const Tensor& base_cache, const Tensor& module_cache,
                                const Tensor& pending, const Tensor& lengths,
                                const Tensor& draft_probs, const Tensor& scratch, int64_t mode,
                                double temperature, int64_t top_k, double top_p,
                                const Tensor& seeds, int64_t first_of) {
  const Place place = place_of(op, "weights", weights);
  const Device device = device_of(op, place);
  Model model;
  const DecodeState state = check_state(
      op, weights, plan, base_cache, module_cache, pending, lengths, draft_probs, scratch, mode,
      temperature, top_k, top_p, seeds, &model, place, [&](const DecodeState& state) {
        return cuda::decode_scratch_bytes(*state.model, state.batch, state.num_draft_tokens,
                                          state.sampling.greedy(), device);
      });
  check_gpu_cache(op, "base_cache", base_cache, model.base.stack.head_dim, device);
  if (state.num_draft_tokens > 0) {
    check_gpu_cache(op, "module_cache", module_cache, model.module.stack.head_dim, device);
    if (module_cache.scalar_type() != base_cache.scalar_type())
      fail(op, "module_cache is ", name_of(module_cache.scalar_type()), ", base_cache ",
           name_of(base_cache.scalar_type()), "; they must be the same");
  }
  if (first_of >= state.batch)
    fail(op, "sequence is ", first_of, "; it must be 0 to ", state.batch - 1);
  const OnGpu on(place.gpu);
  Tensor tokens = torch::stable::empty_like(pending);
  Tensor counts = torch::stable::new_empty(lengths, {state.batch});
  void* stream = current_stream(op, place.gpu);
  auto* const out = data<int64_t>(tokens);
  auto* const n_out = data<int64_t>(counts);
  check_started(op, first_of < 0
                        ? cuda::decode_step(state, out, n_out, device, stream)
                        : cuda::finish_prefill(state, first_of, out, n_out, device, stream));
  return {tokens, counts};
}

std::tuple<Tensor, Tensor> decode_step(const Tensor& weights, const Tensor& plan,
                                       const Tensor& base_cache, const Tensor& module_cache,
                                       const Tensor& pending, const Tensor& lengths,
                                       const Tensor& draft_probs, const Tensor& scratch,
                                       int64_t mode, double temperature, int64_t top_k,
                                       double top_p, const Tensor& seeds) {
  return step("decode_step", weights, plan, base_cache, module_cache, pending, lengths, draft_probs,
              scratch, mode, temperature, top_k, top_p, seeds, -1);
}

std::tuple<Tensor, Tensor> finish_prefill(const Tensor& weights, const Tensor& plan,
                                          const Tensor& base_cache, const Tensor& module_cache,
                                          const Tensor& pending, const Tensor& lengths,
                                          const Tensor& draft_probs, const Tensor& scratch,
                                          int64_t mode, double temperature, int64_t top_k,
                                          double top_p, const Tensor& seeds, int64_t sequence) {
  if (sequence < 0) fail("finish_prefill", "sequence is ", sequence, "; it must be 0 or more");
  return step("finish_prefill", weights, plan, base_cache, module_cache, pending, lengths,
              draft_probs, scratch, mode, temperature, top_k, top_p, seeds, sequence);
}

bool knows_streams() {
  return stream_function() != nullptr;
}

int64_t gpu_scratch_bytes(const Tensor& plan, int64_t weights_bytes, int64_t batch, int64_t drafts,
                          bool greedy, int64_t gpu) {
  constexpr const char* op = "gpu_scratch_bytes";
  check(op, "plan", plan, ScalarType::Long, {kAny});
  Model model;
  // Only sizes are looked at; any address will do.
  const auto* somewhere = reinterpret_cast<const std::byte*>(kAlign);
  const char* wrong =
      read_plan(const_data<int64_t>(plan), plan.numel(), somewhere, weights_bytes, &model, false);
  if (wrong != nullptr) fail(op, "plan and weights don't fit: ", wrong);
  return cuda::decode_scratch_bytes(model, batch, drafts, greedy,
                                    device_of(op, {static_cast<int>(gpu)}));
}

}  // namespace

}  // namespace recycle::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(recycle, m) {
  // The end of a prefill, which recycle_ext/ops/cuda_prefill.py does up to a prompt's last token: a step of that one
  // sequence, which then has its first new token and drafts. pending[sequence][0] is that last token.
  m.def(
      "finish_prefill(Tensor weights, Tensor plan, Tensor(a!) base_cache, Tensor(b!) module_cache, "
      "Tensor(c!) pending, Tensor(d!) lengths, Tensor(e!) draft_probs, Tensor(f!) scratch, "
      "int decode_mode, float temperature, int top_k, float top_p, Tensor seeds, int sequence) "
      "-> (Tensor tokens, Tensor counts)");
  // Bytes of scratch for decode_step on GPU number `gpu`.
  m.def(
      "gpu_scratch_bytes(Tensor plan, int weights_bytes, int batch, int drafts, bool greedy, "
      "int gpu) -> int");
  // Whether this torch can say which CUDA stream it works in; without, no op runs on a GPU.
  m.def("knows_streams() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(recycle, CompositeExplicitAutograd, m) {
  m.impl("knows_streams", TORCH_BOX(&recycle::bindings::knows_streams));
}

STABLE_TORCH_LIBRARY_IMPL(recycle, CPU, m) {
  m.impl("gpu_scratch_bytes", TORCH_BOX(&recycle::bindings::gpu_scratch_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(recycle, CUDA, m) {
  m.impl("attention_decode", TORCH_BOX(&recycle::bindings::attention_decode));
  m.impl("recycle_head", TORCH_BOX(&recycle::bindings::recycle_head));
  m.impl("decode_step", TORCH_BOX(&recycle::bindings::decode_step));
  m.impl("finish_prefill", TORCH_BOX(&recycle::bindings::finish_prefill));
}
