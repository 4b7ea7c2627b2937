// The ops on a GPU: checks, and the calls to csrc/cuda. They are a library of their own, which recycle_ext loads if
// torch has CUDA; the schemas are in ops.cpp. Nothing here waits for the GPU, so that a user's CUDA graph can hold
// an op. The kernels themselves check the values in GPU memory (lengths, tokens), see csrc/cuda/select.h.
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

// Looked up at run time, because a CPU build of torch, which this library may be linked against, lacks the function.
// In a CUDA build the function is in a library with local symbols, so the lookup names the library.
StreamOf stream_function() {
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
  void* at = dlsym(RTLD_DEFAULT, name);
  if (at == nullptr)
    if (void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) at = dlsym(torch_cuda, name);
  return reinterpret_cast<StreamOf>(at);
}

// torch's current CUDA stream.
void* current_stream(const Checker& checker) {
  static const StreamOf function = stream_function();
  void* stream = nullptr;
  if (function == nullptr || function(checker.gpu, &stream) != 0)
    checker.fail("this torch can't say which CUDA stream it works in");
  return stream;
}

// A checker for the GPU of this tensor: all others must be there too.
Checker checker_of(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda()) fail(op, name, " must be on the GPU of the other tensors");
  return {op, static_cast<int>(tensor.get_device_index())};
}

Device device_of(const Checker& checker) {
  Device device;
  if (cuda::describe(checker.gpu, &device)) return device;
  int driver = 0, runtime = 0;
  if (!cuda::driver_is_new_enough(&driver, &runtime))
    checker.fail("the GPU's driver knows CUDA ", driver / 1000, ".", driver % 1000 / 10,
                 ", and recycle_ext was built with CUDA ", runtime / 1000, ".", runtime % 1000 / 10,
                 "; update the driver, or build recycle_ext with the driver's CUDA");
  checker.fail("there is no GPU cuda:", checker.gpu);
}

void check_started(const char* op, bool started) {
  if (!started) throw std::runtime_error(std::string(op) + ": a CUDA kernel didn't start: " + cuda::last_error());
}

// What the GPU kernels need of a vocabulary of n tokens.
void check_gpu_sampling(const Checker& checker, const Sampling& sampling, int64_t n) {
  if (!sampling.greedy() && n > cuda::kMaxSampledTokens)
    checker.fail("the vocabulary has ", n, " tokens; on a GPU a temperature works with at most ",
                 cuda::kMaxSampledTokens);
}

// What the GPU kernels need of a cache beyond what the CPU kernels need.
void check_gpu_cache(const Checker& checker, const char* name, const KvCache& cache, const Device& device) {
  if (cache.type == CacheType::q8) checker.fail(name, " is int8; on a GPU it must be float32 or bfloat16");
  if (reinterpret_cast<uintptr_t>(cache.data) % 16 != 0)
    checker.fail(name, " must begin at an address that is a multiple of 16 (fresh torch tensors do)");
  if (const int64_t heads = cache.n_sequences * cache.n_kv_heads; heads > cuda::kMaxAttentionHeads)
    checker.fail(name, " has ", cache.n_sequences, " sequences of ", cache.n_kv_heads, " heads, ", heads,
                 " in all; on a GPU at most ", cuda::kMaxAttentionHeads);
  const int64_t bytes = cuda::attention_shared_bytes(cache.type, cache.head_dim);
  if (bytes > device.shared_bytes)
    checker.fail(name, " of this dtype with head_dim ", cache.head_dim, " needs ", bytes,
                 " bytes of shared memory, and this GPU has ", device.shared_bytes,
                 cache.type == CacheType::f32 ? "; in bfloat16 it needs half" : "");
}

Tensor attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache, const Tensor& lengths,
                        const Tensor& inv_freq, const std::optional<Tensor>& q_norm,
                        const std::optional<Tensor>& k_norm, double eps) {
  const Checker checker = checker_of("attention_decode", "q", q);
  AttentionParams params = check_attention(checker, q, k, v, cache, lengths, inv_freq, q_norm, k_norm, eps);
  const Device device = device_of(checker);
  check_gpu_cache(checker, "cache", params.cache, device);
  const OnGpu on(checker.gpu);
  Tensor out = torch::stable::empty_like(q);
  params.out = data<float>(out);
  const Tensor scratch = torch::stable::new_empty(q, {cuda::attention_scratch_bytes(params)}, ScalarType::Byte);
  params.scratch = data<std::byte>(scratch);
  check_started(checker.op, cuda::attention_decode(params, device, current_stream(checker)));
  return out;
}

std::tuple<Tensor, Tensor> recycle_head(const Tensor& hidden, const std::optional<Tensor>& norm, double eps,
                                        const Tensor& head, int64_t format, int64_t n_vocab, const Tensor& positions,
                                        double temperature, int64_t top_k, double top_p, const Tensor& seeds) {
  const Checker checker = checker_of("recycle_head", "hidden", hidden);
  HeadParams params =
      check_head(checker, hidden, norm, eps, head, format, n_vocab, positions, temperature, top_k, top_p, seeds);
  const Device device = device_of(checker);
  check_gpu_sampling(checker, params.sampling, params.head.n);
  const OnGpu on(checker.gpu);
  Tensor tokens = torch::stable::new_empty(hidden, {params.n_rows}, ScalarType::Long);
  Tensor log_probs = torch::stable::new_empty(hidden, {params.n_rows});
  params.tokens = data<int64_t>(tokens);
  params.log_probs = data<float>(log_probs);
  const Tensor scratch = torch::stable::new_empty(hidden, {cuda::head_scratch_bytes(params, device)}, ScalarType::Byte);
  params.scratch = data<std::byte>(scratch);
  check_started(checker.op, cuda::recycle_head(params, device, current_stream(checker)));
  return {tokens, log_probs};
}

// A step of all sequences (first_of -1), or the end of a sequence's prefill.
std::tuple<Tensor, Tensor> step(const char* op, const StepArguments& given, int64_t first_of) {
  const Checker checker = checker_of(op, "weights", given.weights);
  const Device device = device_of(checker);
  Model model;
  DecodeState state = check_state(checker, given, &model);
  checker.bytes(
      "scratch", given.scratch,
      cuda::decode_scratch_bytes(model, state.batch, state.num_draft_tokens, state.sampling.greedy(), device));
  state.scratch = data<std::byte>(given.scratch);
  check_gpu_cache(checker, "base_cache", state.base_cache, device);
  check_gpu_sampling(checker, state.sampling, model.base.head.n);
  if (state.num_draft_tokens > 0) {
    check_gpu_cache(checker, "module_cache", state.module_cache, device);
    if (state.module_cache.type != state.base_cache.type)
      checker.fail("module_cache is ", name_of(given.module_cache.scalar_type()), ", base_cache ",
                   name_of(given.base_cache.scalar_type()), "; they must be the same");
  }
  if (first_of >= state.batch) checker.fail("sequence is ", first_of, "; it must be 0 to ", state.batch - 1);
  const OnGpu on(checker.gpu);
  Tensor tokens = torch::stable::empty_like(given.pending);
  Tensor counts = torch::stable::new_empty(given.lengths, {state.batch});
  void* stream = current_stream(checker);
  auto* const out = data<int64_t>(tokens);
  auto* const n_out = data<int64_t>(counts);
  check_started(op, first_of < 0 ? cuda::decode_step(state, out, n_out, device, stream)
                                 : cuda::finish_prefill(state, first_of, out, n_out, device, stream));
  return {tokens, counts};
}

std::tuple<Tensor, Tensor> decode_step(const Tensor& weights, const Tensor& plan, const Tensor& base_cache,
                                       const Tensor& module_cache, const Tensor& pending, const Tensor& lengths,
                                       const Tensor& draft_probs, const Tensor& scratch, int64_t mode,
                                       double temperature, int64_t top_k, double top_p, const Tensor& seeds) {
  return step("decode_step",
              {weights, plan, base_cache, module_cache, pending, lengths, draft_probs, scratch, mode, temperature,
               top_k, top_p, seeds},
              -1);
}

std::tuple<Tensor, Tensor> finish_prefill(const Tensor& weights, const Tensor& plan, const Tensor& base_cache,
                                          const Tensor& module_cache, const Tensor& pending, const Tensor& lengths,
                                          const Tensor& draft_probs, const Tensor& scratch, int64_t mode,
                                          double temperature, int64_t top_k, double top_p, const Tensor& seeds,
                                          int64_t sequence) {
  if (sequence < 0) fail("finish_prefill", "sequence is ", sequence, "; it must be 0 or more");
  return step("finish_prefill",
              {weights, plan, base_cache, module_cache, pending, lengths, draft_probs, scratch, mode, temperature,
               top_k, top_p, seeds},
              sequence);
}

bool knows_streams() { return stream_function() != nullptr; }

int64_t gpu_scratch_bytes(const Tensor& plan, int64_t weights_bytes, int64_t batch, int64_t num_draft_tokens,
                          bool greedy, int64_t gpu) {
  const Checker checker{"gpu_scratch_bytes", static_cast<int>(gpu)};
  Model model;
  // Only sizes are read, so any address serves.
  check_plan(checker, plan, reinterpret_cast<const std::byte*>(kAlign), weights_bytes, false, &model);
  return cuda::decode_scratch_bytes(model, batch, num_draft_tokens, greedy, device_of(checker));
}

}  // namespace

}  // namespace recycle::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(recycle, m) {
  // The end of a prefill. recycle_ext/ops/cuda_prefill.py runs a prompt up to its last token, pending[sequence][0];
  // this is a step of that one sequence, which then has its first new token and draft tokens.
  m.def(
      "finish_prefill(Tensor weights, Tensor plan, Tensor(a!) base_cache, Tensor(b!) module_cache, "
      "Tensor(c!) pending, Tensor(d!) lengths, Tensor(e!) draft_probs, Tensor(f!) scratch, "
      "int decode_mode, float temperature, int top_k, float top_p, Tensor seeds, int sequence) "
      "-> (Tensor tokens, Tensor counts)");
  // Bytes of scratch for decode_step on GPU number `gpu`.
  m.def(
      "gpu_scratch_bytes(Tensor plan, int weights_bytes, int batch, int drafts, bool greedy, "
      "int gpu) -> int");
  // Whether this torch tells its current CUDA stream, which every op on a GPU needs.
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
