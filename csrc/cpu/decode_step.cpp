// The decode step (RecycleGPT, arXiv 2308.03421, section 3; drafts are verified as in speculative
// decoding, Leviathan et al. 2023): base model over the pending tokens, choice, module over the rows just
// confirmed, new drafts. And prefill, which is the same over a prompt.
//
//   pending [batch, k + 1]: t_0 is certain, t_1 .. t_k are drafts; lengths [2, batch]: positions cached,
//   n by the base, m by the module, which is fewer where standard steps (k = 0) have left it out
//   base rows: t_0 .. t_k at positions n .. n + k        hidden h_n .. h_n+k
//   choice: a drafts accepted, y the base model's own token after them
//   module rows: (h_i, x_i+1) for i = n .. n + a, in its own positions m .. m + a; its guess after the last is
//   the next draft t_1, and fed with its own output it goes on to t_2 .. t_k
//
// Bounded by one pass over the base's weights and one over the module's. One parallel region: thread 0
// decides between barriers, the others read what it decided. Nothing is allocated.
#include "recycle/decode_step.h"

#include <algorithm>
#include <cstring>

#include "lm_head.h"
#include "pack.h"
#include "recycle/arena.h"
#include "recycle/choice.h"
#include "recycle/random.h"
#include "sampling.h"
#include "transformer.h"

namespace recycle {

namespace {

struct Work {
  ForwardWork forward;
  HeadWork head;
  float* hidden;  // [rows, hidden] the base's last hidden states, after its final norm
  float* pair;    // [rows, 2 hidden] the module's inputs: embedding, hidden state
  Rows rows;      // of the pass under way
  int64_t*
      tokens;  // [rows] what the pass embeds: the base's tokens, or the token after a module's row
  int64_t* source;   // [rows] where the hidden state of a module's row, or of a head's, stands
  int64_t* picks;    // [rows] what the head picked; sampled: 0. -1: not finite
  int64_t* pending;  // [batch, k + 1] the new ones, until the step is known to succeed
  int64_t* grown;    // [batch] tokens by which a sequence grows
  int64_t* skipped;  // [batch] positions that the base will have and the module won't
  Status status;

  void take(Arena& arena, const Model& model, int64_t batch, int64_t drafts, bool greedy,
            int n_threads) {
    const Stack& base = model.base.stack;
    const Stack& module = model.has_module ? model.module.stack : base;
    const int64_t head_rows = batch * (drafts + 1);
    const int64_t max_rows = std::max(head_rows, kPrefillRows);
    forward.take(arena, max_rows, base, module, n_threads);
    head.take(arena, head_rows, model.base.head.n, greedy, false, n_threads);
    hidden = arena.take<float>(max_rows * base.hidden);
    pair = arena.take<float>(model.has_module ? max_rows * 2 * base.hidden : 0);
    rows.segments = arena.take<Segment>(batch);
    tokens = arena.take<int64_t>(max_rows);
    source = arena.take<int64_t>(max_rows);
    picks = arena.take<int64_t>(head_rows);
    pending = arena.take<int64_t>(head_rows);
    grown = arena.take<int64_t>(batch);
    skipped = arena.take<int64_t>(batch);
  }
};

// The whole team runs every function here, unless its name says that one thread does.
class Step {
 public:
  Step(const Team& team, const DecodeState& state, Work& work)
      : team_(team), state_(state), model_(*state.model), work_(work) {}

  void decode(int64_t* tokens, int64_t* counts) {
    if (leads()) lead_base_rows(tokens, counts);
    team_.barrier(Phase::leader);
    run_base();
    if (leads()) lead_head_rows();
    team_.barrier(Phase::leader);
    run_head(model_.base.head, work_.hidden, nullptr, 0, n_head_rows(),
             state_.num_draft_tokens > 0 ? first_of_module() : first_of_base());
    if (leads()) lead_choice(tokens, counts);
    team_.barrier(Phase::leader);
    if (failed()) return;
    if (state_.num_draft_tokens > 0 && work_.rows.n > 0) {
      run_module(work_.hidden);
      run_drafts();
    }
    if (leads() && !failed()) lead_commit();
  }

  void fill(int64_t sequence, const int64_t* prompt, int64_t n_prompt) {
    for (int64_t first = 0; first < n_prompt; first += kPrefillRows) {
      const int64_t count = std::min(kPrefillRows, n_prompt - first);
      const bool is_last = first + count == n_prompt;
      if (leads()) {
        work_.rows.clear();
        work_.rows.add(sequence, first, count);
        std::copy_n(prompt + first, count, work_.tokens);
        work_.source[0] = count - 1;
      }
      team_.barrier(Phase::leader);
      run_base();
      if (is_last) {
        run_head(model_.base.head, work_.hidden, nullptr, 0, 1, first_of_base());
        if (leads()) lead_first_token(sequence, n_prompt);
        team_.barrier(Phase::leader);
        if (failed()) return;
      }
      if (state_.num_draft_tokens == 0) continue;
      if (leads()) {
        std::copy_n(prompt + first + 1, is_last ? count - 1 : count, work_.tokens);
        if (is_last)
          work_.tokens[count - 1] = work_.pending[sequence * (state_.num_draft_tokens + 1)];
        for (int64_t row = 0; row < count; ++row) work_.source[row] = row;
      }
      team_.barrier(Phase::leader);
      run_module(work_.hidden);
    }
    if (state_.num_draft_tokens > 0) run_drafts();
    if (leads() && !failed()) lead_commit();
  }

 private:
  bool leads() const { return team_.thread == 0; }
  bool failed() const { return work_.status.code != StatusCode::ok; }
  bool greedy() const { return state_.sampling.greedy(); }
  int64_t width() const { return state_.num_draft_tokens + 1; }  // pending tokens of a sequence

  // ---- passes -------------------------------------------------------------------------------------

  // work.rows and work.tokens -> base cache, work.hidden
  void run_base() {
    const Base& base = model_.base;
    const int64_t hidden = base.stack.hidden;
    const Range own = team_.share(work_.rows.n);
    for (int64_t row = own.begin; row < own.end; ++row)
      unpack_row(base.embedding, work_.tokens[row], work_.forward.x + row * hidden);
    rope_tables(team_, work_.rows, base.stack.inv_freq, base.stack.head_dim,
                work_.forward.attention);
    team_.barrier(Phase::leader);
    forward(team_, base.stack, state_.base_cache, work_.rows, first_weights(team_, base.head),
            work_.forward);
    for (int64_t row = own.begin; row < own.end; ++row)
      kernels().rms_norm(work_.forward.x + row * hidden, base.final_norm, base.stack.eps, hidden,
                         work_.hidden + row * hidden);
    team_.barrier(Phase::leader);
  }

  // work.rows, work.tokens and the hidden states at work.source -> module cache, work.forward.x
  void run_module(const float* hidden_states) {
    team_.in_module = true;
    const Module& module = model_.module;
    const int64_t hidden = module.stack.hidden;
    const Range own = team_.share(work_.rows.n);
    for (int64_t s = 0; s < work_.rows.n_segments; ++s) {
      const Segment& segment = work_.rows.segments[s];
      const int64_t end = std::min(own.end, segment.row + segment.n_rows);
      for (int64_t row = std::max(own.begin, segment.row); row < end; ++row)
        module_input(row, segment.position + row - segment.row, hidden_states);
    }
    rope_tables(team_, work_.rows, module.stack.inv_freq, module.stack.head_dim,
                work_.forward.attention);
    team_.barrier(Phase::leader);
    const ThreadWork& own_work = work_.forward.threads[team_.thread];
    const Matrix& matrix = module.input_proj;
    product_tiles(matrix, team_.share(n_panels(matrix.n)),
                  own_work.activations(work_.pair, work_.rows.n, matrix.k, {matrix.format}),
                  work_.rows.n, own_work,
                  first_weights(team_, module.stack, state_.module_cache.type),
                  [&](int64_t row, int64_t n, int64_t count, const float* values) {
                    const float* bias = module.input_bias;
                    float* to = work_.forward.x + row * hidden + n;
                    for (int64_t i = 0; i < count; ++i)
                      to[i] = bias != nullptr ? values[i] + bias[n + i] : values[i];
                  });
    team_.barrier(Phase::input_proj);
    forward(team_, module.stack, state_.module_cache, work_.rows, first_weights(team_, module.head),
            work_.forward);
    team_.in_module = false;
  }

  // One row of pair: the embedding of the token after it, and its hidden state, each normed or not.
  void module_input(int64_t row, int64_t position, const float* hidden_states) {
    const Module& module = model_.module;
    const int64_t hidden = module.stack.hidden;
    float* embedding = work_.pair + row * 2 * hidden;
    float* state = embedding + hidden;
    if (module.zero_first_embedding && position == 0)
      std::memset(embedding, 0, hidden * sizeof(float));
    else
      unpack_row(model_.base.embedding, work_.tokens[row], embedding);
    std::memcpy(state, hidden_states + work_.source[row] * hidden, hidden * sizeof(float));
    const float eps = module.stack.eps;
    if (module.embed_norm != nullptr)
      kernels().rms_norm(embedding, module.embed_norm, eps, hidden, embedding);
    if (module.hidden_norm != nullptr)
      kernels().rms_norm(state, module.hidden_norm, eps, hidden, state);
  }

  // What this thread reads first in run_base() and run_module().
  const std::byte* first_of_base() const {
    return first_weights(team_, model_.base.stack, state_.base_cache.type);
  }
  const std::byte* first_of_module() const {
    const Matrix& matrix = model_.module.input_proj;
    return matrix.panel(team_.share(n_panels(matrix.n)).begin);
  }

  // The head over the states at work.source[0..count): work.picks, and sampled the distributions. then: what
  // this thread reads next.
  void run_head(const Matrix& head, const float* states, const float* norm, float eps,
                int64_t count, const std::byte* then) {
    const ThreadWork& own = work_.forward.threads[team_.thread];
    for (int64_t row = 0; row < count; ++row) {
      const float* state = states + work_.source[row] * head.k;
      float* to = own.input + row * head.k;
      if (norm != nullptr)
        kernels().rms_norm(state, norm, eps, head.k, to);
      else
        std::memcpy(to, state, head.k * sizeof(float));
    }
    scan_head(team_, head, own.input, count, greedy(), false, own, then, work_.head);
    team_.barrier(Phase::head);
    const Range rows = team_.share(count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (greedy()) {
        work_.picks[row] = greedy_pick(work_.head, team_.n_threads, row);
      } else {
        int32_t* order = work_.head.order + team_.thread * work_.head.max_n;
        const float* logits = work_.head.logits + row * work_.head.max_n;
        const bool finite = to_distribution(state_.sampling, logits, head.n, probs(row), order);
        work_.picks[row] = finite ? 0 : -1;
      }
    }
    team_.barrier(Phase::select);
  }

  // The module has run over the confirmed rows of each sequence: its guess after the last of them is the
  // first draft. Each further draft comes from the module's own output in the place of h.
  void run_drafts() {
    const Module& module = model_.module;
    for (int64_t draft = 0; draft < state_.num_draft_tokens; ++draft) {
      if (draft > 0) run_module(work_.forward.x);
      if (leads()) {
        for (int64_t s = 0; s < work_.rows.n_segments; ++s)
          work_.source[s] = work_.rows.segments[s].row + work_.rows.segments[s].n_rows - 1;
      }
      team_.barrier(Phase::leader);
      team_.in_module = true;
      run_head(module.head, work_.forward.x, module.output_norm, module.stack.eps,
               work_.rows.n_segments,
               draft + 1 < state_.num_draft_tokens ? first_of_module() : first_of_base());
      team_.in_module = false;
      if (leads()) lead_draft(draft);
      team_.barrier(Phase::leader);
      if (failed()) return;
    }
  }

  // ---- what thread 0 decides between passes -------------------------------------------------------

  void lead_base_rows(int64_t* tokens, int64_t* counts) {
    work_.rows.clear();
    for (int64_t b = 0; b < state_.batch; ++b) {
      const int64_t* pending = state_.pending + b * width();
      std::fill_n(tokens + b * width(), width(), int64_t{-1});
      std::copy_n(pending, width(), work_.pending + b * width());
      counts[b] = work_.grown[b] = 0;
      work_.skipped[b] = state_.lengths[b] - state_.module_lengths()[b];
      if (pending[0] < 0) continue;
      std::copy_n(pending, width(), work_.tokens + work_.rows.n);
      work_.rows.add(b, state_.lengths[b], width());
    }
  }

  // In alternate mode drafts count without being asked about: only the last row needs the head.
  bool asks_every_row() const { return state_.mode == Mode::verify; }
  int64_t n_head_rows() const { return asks_every_row() ? work_.rows.n : work_.rows.n_segments; }

  void lead_head_rows() {
    for (int64_t row = 0; row < n_head_rows(); ++row)
      work_.source[row] = asks_every_row() ? row : row * width() + state_.num_draft_tokens;
  }

  bool lead_check_finite(int64_t count, int64_t rows_a_sequence, int64_t offset) {
    for (int64_t row = 0; row < count; ++row) {
      if (work_.picks[row] >= 0) continue;
      const Segment& segment = work_.rows.segments[row / rows_a_sequence];
      work_.status = {StatusCode::nonfinite, segment.sequence,
                      segment.position + offset + row % rows_a_sequence};
      return false;
    }
    return true;
  }

  // How far each sequence grows, and the rows the module has to see.
  void lead_choice(int64_t* tokens, int64_t* counts) {
    const int64_t asked = asks_every_row() ? width() : 1;
    if (!lead_check_finite(n_head_rows(), asked, width() - asked)) return;
    const int64_t n_segments = work_.rows.n_segments;
    work_.rows.clear();
    for (int64_t s = 0; s < n_segments; ++s) {
      const Segment segment = work_.rows.segments[s];
      const int64_t b = segment.sequence;
      const int64_t* pending = state_.pending + b * width();
      const Choice choice = asks_every_row() ? verify(s, segment) : accept_all(s, segment);
      counts[b] = work_.grown[b] = choice.accepted + 1;
      if (state_.num_draft_tokens == 0) work_.skipped[b] += work_.grown[b];
      std::copy_n(pending + 1, choice.accepted, tokens + b * width());
      tokens[b * width() + choice.accepted] = choice.token;
      work_.pending[b * width()] = choice.token;
      // Written over segment s or an earlier one: a sequence confirms no more rows than it had.
      const int64_t row = work_.rows.n;
      work_.rows.add(b, state_.module_lengths()[b], choice.accepted + 1);
      for (int64_t i = 0; i <= choice.accepted; ++i) {
        work_.tokens[row + i] = tokens[b * width() + i];
        work_.source[row + i] = segment.row + i;
      }
    }
  }

  Choice accept_all(int64_t s, const Segment& segment) {
    const int64_t position = segment.position + width();
    return {state_.num_draft_tokens,
            choose(s, model_.base.head.n, segment.sequence, position, Stream::sample)};
  }

  Choice verify(int64_t s, const Segment& segment) {
    const int64_t* pending = state_.pending + segment.sequence * width();
    const int64_t row = s * width();
    if (greedy())
      return verify_greedy(pending, state_.num_draft_tokens,
                           [&](int64_t j) { return work_.picks[row + j]; });
    int64_t a = 0;
    for (; a < state_.num_draft_tokens; ++a) {
      const int64_t position = segment.position + a + 1;
      if (!accepts(row + a, segment.sequence, a, position))
        return {a, resample(row + a, segment.sequence, a, position)};
    }
    return {a, choose(row + a, model_.base.head.n, segment.sequence, segment.position + width(),
                      Stream::sample)};
  }

  // Speculative sampling (Leviathan et al. 2023, algorithm 1): a draft drawn from q counts with
  // probability min(1, p / q); else the token is drawn from max(0, p - q).
  bool accepts(int64_t row, int64_t sequence, int64_t draft, int64_t position) const {
    const int64_t token = state_.pending[sequence * width() + draft + 1];
    const float p = probs(row)[token];
    const float q = draft_probs(sequence, draft)[draft_index(token)];
    return accepts_draft(random(sequence, position, Stream::accept), p, q);
  }

  int64_t resample(int64_t row, int64_t sequence, int64_t draft, int64_t position) {
    float* p = probs(row);
    const float* q = draft_probs(sequence, draft);
    for (int64_t i = 0; i < model_.module.head.n; ++i) {
      float& probability = p[draft_token(i)];
      probability = residual(probability, q[i]);
    }
    return draw(p, model_.base.head.n, random(sequence, position, Stream::resample));
  }

  void lead_first_token(int64_t sequence, int64_t n_prompt) {
    if (!lead_check_finite(1, 1, work_.rows.n - 1)) return;
    std::copy_n(state_.pending, state_.batch * width(), work_.pending);
    for (int64_t b = 0; b < state_.batch; ++b) {
      work_.grown[b] = 0;
      work_.skipped[b] = state_.lengths[b] - state_.module_lengths()[b];
    }
    work_.grown[sequence] = n_prompt - state_.lengths[sequence];
    work_.skipped[sequence] = state_.num_draft_tokens > 0 ? 0 : n_prompt;
    work_.pending[sequence * width()] =
        choose(0, model_.base.head.n, sequence, n_prompt, Stream::sample);
  }

  // The head's picks are draft `draft` + 1 of each sequence; the next pass of the module, if there is one, is
  // over one row a sequence.
  void lead_draft(int64_t draft) {
    for (int64_t s = 0; s < work_.rows.n_segments; ++s) {
      const Segment segment = work_.rows.segments[s];
      const int64_t row = segment.position + segment.n_rows - 1;
      // Draws and messages go by the text's positions, which are the base's.
      const int64_t position = row + work_.skipped[segment.sequence];
      if (work_.picks[s] < 0) {
        work_.status = {StatusCode::nonfinite, segment.sequence, position};
        return;
      }
      const int64_t index =
          choose(s, model_.module.head.n, segment.sequence, position + 2, Stream::draft);
      const int64_t token = draft_token(index);
      work_.pending[segment.sequence * width() + draft + 1] = token;
      if (!greedy() && state_.mode == Mode::verify)
        std::copy_n(probs(s), model_.module.head.n, draft_probs(segment.sequence, draft));
      // work.source[s] is the row the draft came from: its output stands for the next row's h.
      work_.tokens[s] = token;
      work_.rows.segments[s] = {segment.sequence, row + 1, s, 1};
    }
    work_.rows.n = work_.rows.n_segments;
  }

  void lead_commit() {
    std::copy_n(work_.pending, state_.batch * width(), state_.pending);
    for (int64_t b = 0; b < state_.batch; ++b) {
      state_.lengths[b] += work_.grown[b];
      state_.module_lengths()[b] = state_.lengths[b] - work_.skipped[b];
    }
  }

  // ---- small things -------------------------------------------------------------------------------

  float* probs(int64_t row) const { return work_.head.probs + row * work_.head.max_n; }

  float* draft_probs(int64_t sequence, int64_t draft) const {
    return state_.draft_probs + (sequence * state_.num_draft_tokens + draft) * model_.module.head.n;
  }

  float random(int64_t sequence, int64_t position, Stream stream) const {
    return uniform(static_cast<uint64_t>(state_.sampling.seeds[sequence]),
                   static_cast<uint64_t>(position), stream);
  }

  // What the head over n tokens chose for `row`.
  int64_t choose(int64_t row, int64_t n, int64_t sequence, int64_t position, Stream stream) const {
    return greedy() ? work_.picks[row] : draw(probs(row), n, random(sequence, position, stream));
  }

  int64_t draft_token(int64_t index) const {
    const int64_t* ids = model_.module.draft_vocab;
    return ids != nullptr ? ids[index] : index;
  }

  // `token` is in the draft vocabulary: it was drawn from it.
  int64_t draft_index(int64_t token) const {
    const int64_t* ids = model_.module.draft_vocab;
    return ids != nullptr ? std::lower_bound(ids, ids + model_.module.head.n, token) - ids : token;
  }

  Team team_;
  const DecodeState& state_;
  const Model& model_;
  Work& work_;
};

struct DecodeCall {
  const DecodeState& state;
  Work work;
  int64_t* tokens;
  int64_t* counts;
};

struct PrefillCall {
  const DecodeState& state;
  Work work;
  int64_t sequence;
  const int64_t* prompt;
  int64_t n_prompt;
};

void take(const DecodeState& state, Work& work) {
  Arena arena(state.scratch);
  work.take(arena, *state.model, state.batch, state.num_draft_tokens, state.sampling.greedy(),
            n_threads());
}

}  // namespace

int64_t decode_scratch_bytes(const Model& model, int64_t batch, int64_t drafts, bool greedy,
                             int n_threads) {
  Arena arena(nullptr);
  Work work;
  work.take(arena, model, batch, drafts, greedy, n_threads);
  return arena.used();
}

Status decode_step(const DecodeState& state, int64_t* tokens, int64_t* counts) {
  DecodeCall call{state, {}, tokens, counts};
  take(state, call.work);
  parallel(
      [](const Team& team, void* context) {
        auto& call = *static_cast<DecodeCall*>(context);
        Step(team, call.state, call.work).decode(call.tokens, call.counts);
      },
      &call);
  return call.work.status;
}

Status prefill(const DecodeState& state, int64_t sequence, const int64_t* prompt,
               int64_t n_prompt) {
  PrefillCall call{state, {}, sequence, prompt, n_prompt};
  take(state, call.work);
  parallel(
      [](const Team& team, void* context) {
        auto& call = *static_cast<PrefillCall*>(context);
        Step(team, call.state, call.work).fill(call.sequence, call.prompt, call.n_prompt);
      },
      &call);
  return call.work.status;
}

}  // namespace recycle
