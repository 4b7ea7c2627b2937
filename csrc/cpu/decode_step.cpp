// The decode step (RecycleGPT, Jiang et al. 2023, arXiv 2308.03421, section 3; verified as in speculative decoding,
// Leviathan et al. 2023, arXiv 2211.17192), and prefill, which is the same over a prompt.
//
//   pending [batch, k + 1]: t_0 is certain, t_1 .. t_k are draft tokens. lengths [2, batch]: the base model has n
//   positions in its cache, the module m <= n (standard steps leave the module out)
//   1  the base model runs t_0 .. t_k at positions n .. n + k           hidden states h_n .. h_n+k
//   2  choice: a draft tokens are accepted, y is the base model's own token after them
//   3  the module runs the confirmed rows (h_i, x_i+1), i = n .. n + a, at its positions m .. m + a; its output after
//      the last row gives the new t_1
//   4  the module runs its own output in place of h for t_2 .. t_k
//
// Bounded by one pass over the base model's weights and k passes over the module's. A step is one parallel region, a
// prefill one for each pass over the weights: between barriers rank 0 decides (select.h), and the other threads read its decisions. Nothing is allocated.
#include "recycle/decode_step.h"

#include <algorithm>
#include <cstring>

#include "decode_work.h"
#include "pack.h"
#include "recycle/arena.h"
#include "select.h"

namespace recycle {

namespace {

// All threads of the team run each function here.
class Step {
 public:
  Step(const Team& team, const DecodeState& state, DecodeWork& work)
      : team_(team),
        state_(state),
        model_(*state.model),
        work_(work),
        selector_(state, work),
        scratch_(work.forward.threads[team.thread]) {}

  void decode(int64_t* tokens, int64_t* counts) {
    decide([&] { selector_.begin_step(); });
    run_base();
    decide([&] { selector_.select_head_rows(); });
    run_base_head(selector_.n_head_rows(), drafts() ? first_of_module() : first_of_base());
    decide([&] { selector_.choose(); });
    if (drafts() && work_.rows.n > 0) {
      run_module(work_.hidden);
      run_drafts();
    }
    if (team_.is_leader()) selector_.commit(tokens, counts);
  }

  // Rows [first, first + count) of a prompt.
  void prefill(int64_t sequence, const int64_t* prompt, int64_t n_prompt, int64_t first, int64_t count) {
    const bool is_last = first + count == n_prompt;
    decide([&] {
      work_.rows.clear();
      work_.rows.add(sequence, first, count);
      std::copy_n(prompt + first, count, work_.tokens);
      work_.source[0] = count - 1;
    });
    run_base();
    if (is_last) {
      run_base_head(1, first_of_base());
      decide([&] { selector_.choose_first(sequence, n_prompt); });
    }
    if (drafts() && work_.rows.n > 0) {
      decide([&] {
        std::copy_n(prompt + first + 1, is_last ? count - 1 : count, work_.tokens);
        if (is_last) work_.tokens[count - 1] = work_.pending[sequence * state_.rows_per_sequence()];
        for (int64_t row = 0; row < count; ++row) work_.source[row] = row;
      });
      run_module(work_.hidden);
      if (is_last) run_drafts();
    }
    if (is_last && team_.is_leader()) selector_.commit(nullptr, nullptr);
  }

 private:
  bool drafts() const { return state_.num_draft_tokens > 0; }

  // Rank 0 decides, then all threads see the decision.
  template <class Decision>
  void decide(Decision decision) {
    if (team_.is_leader()) decision();
    team_.barrier(Phase::leader);
  }

  // work.rows and work.tokens -> the base model's cache, work.hidden
  void run_base() {
    const Base& base = model_.base;
    const int64_t hidden = base.stack.hidden;
    const Range share = team_.share(work_.rows.n);
    for (int64_t row = share.begin; row < share.end; ++row)
      unpack_row(base.embedding, work_.tokens[row], work_.forward.x + row * hidden);
    rope_tables(team_, work_.rows, base.stack.inv_freq, base.stack.head_dim, work_.forward.attention);
    team_.barrier(Phase::leader);
    forward(team_, base.stack, state_.base_cache, work_.rows, first_weights(team_, base.head), work_.forward);
    for (int64_t row = share.begin; row < share.end; ++row)
      kernels().rms_norm(work_.forward.x + row * hidden, base.final_norm, base.stack.eps, hidden,
                         work_.hidden + row * hidden);
    team_.barrier(Phase::leader);
  }

  // work.rows, work.tokens and the hidden states at work.source -> the module's cache, work.forward.x
  void run_module(const float* hidden_states) {
    team_.in_module = true;
    const Module& module = model_.module;
    for_each_row(work_.rows, team_.share(work_.rows.n), [&](const Segment&, int64_t row, int64_t position) {
      write_module_input(row, position, hidden_states);
    });
    rope_tables(team_, work_.rows, module.stack.inv_freq, module.stack.head_dim, work_.forward.attention);
    team_.barrier(Phase::leader);
    const Matrix& matrix = module.input_proj;
    linear_bias(matrix, module.input_bias, team_.share(n_panels(matrix.n)),
                scratch_.activations(work_.module_input, work_.rows.n, matrix.k, {matrix.format}), work_.rows.n,
                scratch_, first_weights(team_, module.stack, state_.module_cache.type), work_.forward.x);
    team_.barrier(Phase::input_proj);
    forward(team_, module.stack, state_.module_cache, work_.rows, first_weights(team_, module.head), work_.forward);
    team_.in_module = false;
  }

  // One row of work.module_input: the embedding of the token after it, and its hidden state, each with the norm
  // that the module has for it.
  void write_module_input(int64_t row, int64_t position, const float* hidden_states) {
    const Module& module = model_.module;
    const int64_t hidden = module.stack.hidden;
    float* embedding = work_.module_input + row * 2 * hidden;
    float* state = embedding + hidden;
    if (module.zero_first_embedding && position == 0)
      std::memset(embedding, 0, hidden * sizeof(float));
    else
      unpack_row(model_.base.embedding, work_.tokens[row], embedding);
    std::memcpy(state, hidden_states + work_.source[row] * hidden, hidden * sizeof(float));
    const float eps = module.stack.eps;
    if (module.embed_norm != nullptr) kernels().rms_norm(embedding, module.embed_norm, eps, hidden, embedding);
    if (module.hidden_norm != nullptr) kernels().rms_norm(state, module.hidden_norm, eps, hidden, state);
  }

  // What this thread reads first in run_base() and run_module().
  const std::byte* first_of_base() const { return first_weights(team_, model_.base.stack, state_.base_cache.type); }
  const std::byte* first_of_module() const {
    const Matrix& matrix = model_.module.input_proj;
    return matrix.panel(team_.share(n_panels(matrix.n)).begin);
  }

  void run_base_head(int64_t count, const std::byte* next) {
    run_head(team_, model_.base.head, {work_.hidden, count, work_.source}, state_.sampling, scratch_, next, work_.head);
    team_.barrier(Phase::select);
  }

  // The module has run the confirmed rows of each sequence. Its output after the last of them gives the first draft
  // token; each further one comes from the module's own output in place of h.
  void run_drafts() {
    const Module& module = model_.module;
    for (int64_t draft = 0; draft < state_.num_draft_tokens; ++draft) {
      if (draft > 0) run_module(work_.forward.x);
      decide([&] { selector_.select_last_rows(); });
      team_.in_module = true;
      const bool is_last = draft + 1 == state_.num_draft_tokens;
      run_head(team_, module.head,
               {work_.forward.x, work_.rows.n_segments, work_.source, module.output_norm, module.stack.eps},
               state_.sampling, scratch_, is_last ? first_of_base() : first_of_module(), work_.head);
      team_.barrier(Phase::select);
      team_.in_module = false;
      decide([&] { selector_.take_draft(draft); });
      if (work_.rows.n == 0) return;  // every sequence has failed
    }
  }

  Team team_;
  const DecodeState& state_;
  const Model& model_;
  DecodeWork& work_;
  Selector selector_;
  const ThreadScratch& scratch_;
};

DecodeWork take_work(const DecodeState& state) {
  DecodeWork work;
  Arena arena(state.scratch);
  work.take(arena, *state.model, state.batch, state.num_draft_tokens, state.sampling.greedy(), state.n_threads);
  return work;
}

}  // namespace

int64_t decode_scratch_bytes(const Model& model, int64_t batch, int64_t num_draft_tokens, bool greedy, int n_threads) {
  Arena arena(nullptr);
  DecodeWork work;
  work.take(arena, model, batch, num_draft_tokens, greedy, n_threads);
  return arena.used();
}

void decode_step(const DecodeState& state, int64_t* tokens, int64_t* counts) {
  DecodeWork work = take_work(state);
  parallel(state.n_threads, [&](const Team& team) { Step(team, state, work).decode(tokens, counts); });
}

Status prefill(const DecodeState& state, int64_t sequence, const int64_t* prompt, int64_t n_prompt,
               bool (*interrupted)()) {
  DecodeWork work = take_work(state);
  // Idle until the end: the sequence's former text is gone once the first rows are in the caches.
  std::fill_n(state.pending + sequence * state.rows_per_sequence(), state.rows_per_sequence(), int64_t{-1});
  state.lengths[sequence] = state.module_lengths()[sequence] = 0;
  // One parallel region for each pass, and not one for all, so that other threads' steps run in between.
  for (int64_t first = 0; first < n_prompt; first += kPrefillRows) {
    const int64_t count = std::min(kPrefillRows, n_prompt - first);
    if (first > 0 && interrupted != nullptr && interrupted()) return {StatusCode::interrupted, sequence, first};
    parallel(state.n_threads,
             [&](const Team& team) { Step(team, state, work).prefill(sequence, prompt, n_prompt, first, count); });
  }
  if (work.grown[sequence] < 0) return {StatusCode::nonfinite, sequence, n_prompt - 1};
  return {};
}

}  // namespace recycle
