// The decode step as a row of kernels: csrc/cpu/decode_step.cpp says what it computes. A layer is five of them (q, k
// and v; attention; output; gate and up; down), and between the passes stands one for the choice or a draft.
//
// Bounded by reading the weights; what is lost is where one kernel ends and the next one fills the GPU again. On
// Hopper the next one starts early and asks for its weights meanwhile (intrinsics.cuh). 24 layers are 120 kernels.
#include "step.h"

#include "recycle/arena.h"
#include "sampling.h"
#include "select.h"

namespace recycle::cuda {

namespace {

struct Work {
  SequenceArrays sequences = {};
  AttentionArrays attention;
  float* activation;  // [rows, intermediate]
  HeadBests base_bests, module_bests;

  void take(Arena& arena, const Model& model, int64_t batch, int64_t drafts, bool greedy,
            const Launcher& launcher) {
    const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
    const Stack& a = model.base.stack;
    const Stack& b = model.has_module ? model.module.stack : a;
    const int64_t width = drafts + 1;
    const int64_t rows = batch * width;
    const int64_t q = larger(a.q_size(), b.q_size());
    const int64_t kv = larger(a.kv_size(), b.kv_size());
    const int64_t heads = larger(a.n_heads, b.n_heads);
    sequences.x = arena.take<float>(rows * a.hidden);
    sequences.module_x = arena.take<float>(drafts > 0 ? rows * a.hidden : 0);
    sequences.pair = arena.take<float>(drafts > 0 ? rows * 2 * a.hidden : 0);
    sequences.positions = arena.take<int>(rows);
    sequences.head_rows = arena.take<int>(rows);
    sequences.draft_rows = arena.take<int>(batch);
    sequences.draft_positions = arena.take<int>(batch);
    sequences.new_pending = arena.take<int64_t>(rows);
    sequences.grown = arena.take<int64_t>(batch);
    sequences.n_arrived =
        static_cast<int>(larger(counters(a, batch, width), counters(b, batch, width)));
    sequences.arrived = arena.take<unsigned>(sequences.n_arrived);
    attention.q = arena.take<float>(rows * q);
    attention.k = arena.take<float>(rows * kv);
    attention.v = arena.take<float>(rows * kv);
    attention.out = arena.take<float>(rows * q);
    attention.weighted = arena.take<float>(kSplits * rows * q);
    attention.total = arena.take<float>(kSplits * rows * heads);
    attention.maximum = arena.take<float>(kSplits * rows * heads);
    attention.arrived = sequences.arrived;
    activation = arena.take<float>(rows * larger(a.intermediate, b.intermediate));
    take_bests(arena, model.base.head, rows, launcher, base_bests);
    if (drafts > 0) take_bests(arena, model.module.head, batch, launcher, module_bests);
    if (greedy) return;
    sequences.base_probs = arena.take<float>(rows * model.base.head.n);
    sequences.base_finite = arena.take<int>(rows);
    sequences.module_probs = arena.take<float>(drafts > 0 ? batch * model.module.head.n : 0);
    sequences.module_finite = arena.take<int>(batch);
  }

 private:
  static int64_t counters(const Stack& stack, int64_t batch, int64_t width) {
    return batch * stack.n_kv_heads * query_tiles(width, stack.n_heads / stack.n_kv_heads);
  }
  static void take_bests(Arena& arena, const Matrix& head, int64_t rows, const Launcher& launcher,
                         HeadBests& bests) {
    bests.blocks = launcher.blocks(n_panels(head.n));
    bests.value = arena.take<float>(rows * bests.blocks);
    bests.id = arena.take<int>(rows * bests.blocks);
  }
};

class Step {
 public:
  Step(const DecodeState& state, const Work& work, Launcher& launcher)
      : state_(state), model_(*state.model), work_(work), launcher_(launcher) {}

  // first_of: -1, or the sequence whose prefill ends.
  void decode(int64_t* tokens, int64_t* counts, int first_of) {
    const int batch = static_cast<int>(state_.batch);
    const int width = static_cast<int>(state_.drafts) + 1;
    SequenceCall call;
    call.model = &model_;
    call.state = state_;
    call.capacity = state_.base_cache.capacity;
    if (state_.drafts > 0 && state_.module_cache.capacity < call.capacity)
      call.capacity = state_.module_cache.capacity;
    call.first_of = first_of;
    call.arrays = work_.sequences;
    call.tokens = tokens;
    call.counts = counts;

    begin_step(launcher_, call);
    const RowMap rows{batch, width, work_.sequences.positions};
    layers(model_.base.stack, state_.base_cache, rows, work_.sequences.x);
    const bool asks_every_row = state_.mode == Mode::verify && first_of < 0;
    run_head(model_.base.head,
             {work_.sequences.x, work_.sequences.head_rows, asks_every_row ? rows.n() : batch,
              model_.base.final_norm, model_.base.stack.eps},
             work_.base_bests, work_.sequences.base_probs, work_.sequences.base_finite);
    choose(launcher_, call, work_.base_bests);

    const Module& drafter = model_.module;
    for (int draft = 0; draft < state_.drafts; ++draft) {
      const RowMap seen = draft == 0 ? rows : RowMap{batch, 1, work_.sequences.draft_positions};
      project(launcher_, drafter.input_proj, drafter.input_bias,
              {work_.sequences.pair, nullptr, seen.n()}, false, work_.sequences.module_x);
      layers(drafter.stack, state_.module_cache, seen, work_.sequences.module_x);
      run_head(drafter.head,
               {work_.sequences.module_x, work_.sequences.draft_rows, batch, drafter.output_norm,
                drafter.stack.eps},
               work_.module_bests, work_.sequences.module_probs, work_.sequences.module_finite);
      take_draft(launcher_, call, work_.module_bests, draft);
    }
  }

 private:
  // probs, finite: null when greedy
  void run_head(const Matrix& head, const Input& x, const HeadBests& bests, float* probs,
                int* finite) {
    scan_head(launcher_, head, x, probs, bests);
    if (!state_.sampling.greedy())
      to_distributions(launcher_, state_.sampling, x.rows, head.n, probs, finite);
  }

  void layers(const Stack& stack, const KvCache& cache, const RowMap& rows, float* x) {
    for (int64_t index = 0; index < stack.n_layers; ++index) {
      const Layer layer = stack.layer(index);
      const auto normed = [&](const float* norm) {
        return Input{x, nullptr, rows.n(), norm, stack.eps};
      };
      project_qkv(launcher_, stack, layer, normed(layer.input_norm), work_.attention);
      AttentionCall call;
      call.rows = rows;
      call.n_heads = static_cast<int>(stack.n_heads);
      call.n_kv_heads = static_cast<int>(stack.n_kv_heads);
      call.head_dim = static_cast<int>(stack.head_dim);
      call.inv_freq = stack.inv_freq;
      call.q_norm = layer.q_norm;
      call.k_norm = layer.k_norm;
      call.eps = stack.eps;
      call.cache = cache;
      call.layer = index;
      call.arrays = work_.attention;
      attend(launcher_, call);
      project(launcher_, layer.o, nullptr, {work_.attention.out, nullptr, rows.n()}, true, x);
      gate_up(launcher_, stack, layer, normed(layer.post_norm), work_.activation);
      project(launcher_, layer.down, nullptr, {work_.activation, nullptr, rows.n()}, true, x);
    }
  }

  const DecodeState& state_;
  const Model& model_;
  const Work& work_;
  Launcher& launcher_;
};

}  // namespace

int64_t decode_scratch_bytes(const Model& model, int64_t batch, int64_t drafts, bool greedy,
                             const Device& device) {
  Arena arena(nullptr);
  Work work;
  work.take(arena, model, batch, drafts, greedy, Launcher(device, nullptr));
  return arena.used();
}

namespace {

bool run(const DecodeState& state, int first_of, int64_t* tokens, int64_t* counts,
         const Device& device, void* stream) {
  Launcher launcher(device, stream);
  Arena arena(state.scratch);
  Work work;
  work.take(arena, *state.model, state.batch, state.drafts, state.sampling.greedy(), launcher);
  Step(state, work, launcher).decode(tokens, counts, first_of);
  return launcher.ok;
}

}  // namespace

bool decode_step(const DecodeState& state, int64_t* tokens, int64_t* counts, const Device& device,
                 void* stream) {
  return run(state, -1, tokens, counts, device, stream);
}

bool finish_prefill(const DecodeState& state, int64_t sequence, int64_t* tokens, int64_t* counts,
                    const Device& device, void* stream) {
  return run(state, static_cast<int>(sequence), tokens, counts, device, stream);
}

}  // namespace recycle::cuda
