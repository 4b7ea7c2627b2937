// decode_step as a sequence of kernels; csrc/cpu/decode_step.cpp says what a step computes. A layer is five kernels
// (qkv, attention, linear, gate_up, linear); between the passes is one kernel for the choice or a draft token.
//
// Bounded by reading the weights. Time is lost where one kernel ends and the next one fills the GPU again: 24 layers
// are 120 kernels. On Hopper the next kernel starts early and prefetches its weights meanwhile (intrinsics.cuh).
#include "ops.h"

#include <algorithm>

#include "sampling.h"
#include "select.h"

namespace recycle::cuda {

namespace {

// Counters of attention: one for each key/value head of a sequence and tile of queries.
int64_t n_counters(const Stack& stack, int64_t batch, int64_t rows_per_sequence) {
  return batch * stack.n_kv_heads * query_tiles(rows_per_sequence, stack.n_heads / stack.n_kv_heads);
}

// The base model and the module share buffers.
struct Scratch {
  SelectBuffers select = {};
  float *q, *k, *v;  // as in AttentionBuffers
  AttentionBuffers attention = {};
  float* activation;  // [rows, intermediate]
  PartialArgmax base_partial, module_partial;

  void take(Arena& arena, const Model& model, int64_t batch, int64_t num_draft_tokens, bool greedy,
            const Device& device) {
    const Stack& base = model.base.stack;
    const Stack& drafter = model.has_module ? model.module.stack : base;
    const bool drafts = num_draft_tokens > 0;
    const int64_t rows_per_sequence = num_draft_tokens + 1;
    const int64_t rows = batch * rows_per_sequence;
    const int64_t q_size = std::max(base.q_size(), drafter.q_size());
    const int64_t kv_size = std::max(base.kv_size(), drafter.kv_size());
    select.x = arena.take<float>(rows * base.hidden);
    select.module_x = arena.take<float>(drafts ? rows * base.hidden : 0);
    select.module_input = arena.take<float>(drafts ? rows * 2 * base.hidden : 0);
    select.positions = arena.take<int>(rows);
    select.head_rows = arena.take<int>(rows);
    select.draft_rows = arena.take<int>(batch);
    select.draft_positions = arena.take<int>(batch);
    select.new_pending = arena.take<int64_t>(rows);
    select.n_counters = static_cast<int>(
        std::max(n_counters(base, batch, rows_per_sequence), n_counters(drafter, batch, rows_per_sequence)));
    attention.take_splits(arena, rows, q_size, std::max(base.n_heads, drafter.n_heads), select.n_counters);
    select.blocks_done = attention.blocks_done;
    attention.q = q = arena.take<float>(rows * q_size);
    attention.k = k = arena.take<float>(rows * kv_size);
    attention.v = v = arena.take<float>(rows * kv_size);
    attention.out = arena.take<float>(rows * q_size);
    activation = arena.take<float>(rows * std::max(base.intermediate, drafter.intermediate));
    base_partial.take(arena, device, rows, model.base.head);
    if (drafts) module_partial.take(arena, device, batch, model.module.head);
    if (greedy) return;
    select.base_probs = arena.take<float>(rows * model.base.head.n);
    select.base_finite = arena.take<int>(rows);
    select.module_probs = arena.take<float>(drafts ? num_draft_tokens * batch * model.module.head.n : 0);
    select.module_finite = arena.take<int>(batch);
  }
};

class Step {
 public:
  Step(const DecodeState& state, const Device& device, void* stream) : state_(state), launcher_(device, stream) {
    Arena arena(state.scratch);
    scratch_.take(arena, *state.model, state.batch, state.num_draft_tokens, state.sampling.greedy(), device);
  }

  // prefill_sequence: the sequence whose prefill ends; -1: none. False if CUDA refused a launch.
  bool run(int prefill_sequence, int64_t* tokens, int64_t* counts) {
    const SelectBuffers& buffers = scratch_.select;
    const Base& base = state_.model->base;
    const Module& drafter = state_.model->module;
    const SelectParams select = select_params(state_, prefill_sequence, buffers, tokens, counts);
    begin_step(launcher_, select);
    const RowMap rows{select.batch, select.rows_per_sequence, buffers.positions};
    run_layers(base.stack, state_.base_cache, rows, buffers.x);
    const int n_head_rows = select.head_reads_every_row ? rows.n_rows() : rows.batch;
    run_head(base.head, {buffers.x, buffers.head_rows, n_head_rows, base.final_norm, base.stack.eps},
             scratch_.base_partial, buffers.base_probs, buffers.base_finite);
    select_tokens(launcher_, select, scratch_.base_partial);

    for (int draft = 0; draft < select.num_draft_tokens; ++draft) {
      const RowMap pass = draft == 0 ? rows : RowMap{rows.batch, 1, buffers.draft_positions};
      linear(launcher_, drafter.input_proj, drafter.input_bias, {buffers.module_input, nullptr, pass.n_rows()}, false,
             buffers.module_x);
      run_layers(drafter.stack, state_.module_cache, pass, buffers.module_x);
      float* probs = buffers.module_probs;
      if (!state_.sampling.greedy()) probs += draft * rows.batch * drafter.head.n;
      run_head(drafter.head, {buffers.module_x, buffers.draft_rows, rows.batch, drafter.output_norm, drafter.stack.eps},
               scratch_.module_partial, probs, buffers.module_finite);
      select_draft(launcher_, select, scratch_.module_partial, draft);
    }
    return launcher_.ok();
  }

 private:
  // probs, finite: null in a greedy step.
  void run_head(const Matrix& head, const GemvInput& x, const PartialArgmax& partial, float* probs, int* finite) {
    lm_head(launcher_, head, x, probs, partial);
    if (!state_.sampling.greedy()) logits_to_probs(launcher_, state_.sampling, x.n_rows, head.n, probs, finite);
  }

  void run_layers(const Stack& stack, const KvCache& cache, const RowMap& rows, float* x) {
    AttentionKernelParams params;
    params.rows = rows;
    params.n_heads = static_cast<int>(stack.n_heads);
    params.n_kv_heads = static_cast<int>(stack.n_kv_heads);
    params.head_dim = static_cast<int>(stack.head_dim);
    params.inv_freq = stack.inv_freq;
    params.eps = stack.eps;
    params.cache = cache;
    params.buffers = scratch_.attention;
    for (const Layer& layer : stack.layers) {
      qkv(launcher_, stack, layer, {x, nullptr, rows.n_rows(), layer.input_norm, stack.eps}, scratch_.q, scratch_.k,
          scratch_.v);
      params.q_norm = layer.q_norm;
      params.k_norm = layer.k_norm;
      attention(launcher_, params);
      ++params.layer;
      linear(launcher_, layer.o, nullptr, {params.buffers.out, nullptr, rows.n_rows()}, true, x);
      gate_up(launcher_, stack, layer, {x, nullptr, rows.n_rows(), layer.post_norm, stack.eps}, scratch_.activation);
      linear(launcher_, layer.down, nullptr, {scratch_.activation, nullptr, rows.n_rows()}, true, x);
    }
  }

  const DecodeState& state_;
  Launcher launcher_;
  Scratch scratch_;
};

}  // namespace

int64_t decode_scratch_bytes(const Model& model, int64_t batch, int64_t num_draft_tokens, bool greedy,
                             const Device& device) {
  Arena arena(nullptr);
  Scratch scratch;
  scratch.take(arena, model, batch, num_draft_tokens, greedy, device);
  return arena.used();
}

bool decode_step(const DecodeState& state, int64_t* tokens, int64_t* counts, const Device& device, void* stream) {
  return Step(state, device, stream).run(-1, tokens, counts);
}

bool finish_prefill(const DecodeState& state, int64_t sequence, int64_t* tokens, int64_t* counts, const Device& device,
                    void* stream) {
  return Step(state, device, stream).run(static_cast<int>(sequence), tokens, counts);
}

}  // namespace recycle::cuda
