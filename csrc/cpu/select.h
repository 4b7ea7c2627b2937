// class Selector, the decisions of rank 0 between the passes of a decode step: the base model's rows, the accepted draft
// tokens, the module's rows, the new draft tokens, the new state. A decision is a few reads and writes for each sequence, and for
// sampled decoding a pass over the vocabulary for each draw. Its GPU counterpart is csrc/cuda/select.cu.
#pragma once

#include <algorithm>
#include <cstdint>

#include "decode_work.h"
#include "recycle/choice.h"
#include "recycle/decode_step.h"
#include "recycle/random.h"
#include "sampling.h"

namespace recycle {

class Selector {
 public:
  Selector(const DecodeState& state, DecodeWork& work) : state_(state), model_(*state.model), work_(work) {}

  // Any thread may call these two.
  bool failed() const { return work_.status.code != StatusCode::ok; }
  int64_t n_head_rows() const { return verifies() ? work_.rows.n : work_.rows.n_segments; }

  // The base model's rows: the pending tokens of all sequences that are not idle.
  void begin_step(int64_t* tokens, int64_t* counts) {
    const int64_t per_sequence = state_.rows_per_sequence();
    work_.rows.clear();
    for (int64_t b = 0; b < state_.batch; ++b) {
      const int64_t* pending = state_.pending + b * per_sequence;
      std::fill_n(tokens + b * per_sequence, per_sequence, int64_t{-1});
      std::copy_n(pending, per_sequence, work_.pending + b * per_sequence);
      counts[b] = work_.grown[b] = 0;
      work_.skipped[b] = state_.lengths[b] - state_.module_lengths()[b];
      if (pending[0] < 0) continue;
      std::copy_n(pending, per_sequence, work_.tokens + work_.rows.n);
      work_.rows.add(b, state_.lengths[b], per_sequence);
    }
  }

  // The rows of the base model's head.
  void select_head_rows() {
    for (int64_t row = 0; row < n_head_rows(); ++row)
      work_.source[row] = verifies() ? row : row * state_.rows_per_sequence() + state_.num_draft_tokens;
  }

  // How far each sequence grows, and the rows that the module reads.
  void choose(int64_t* tokens, int64_t* counts) {
    const int64_t per_sequence = state_.rows_per_sequence();
    const int64_t head_rows = verifies() ? per_sequence : 1;  // of a sequence
    if (!check_finite(n_head_rows(), head_rows, per_sequence - head_rows)) return;
    const int64_t n_segments = work_.rows.n_segments;
    work_.rows.clear();
    for (int64_t s = 0; s < n_segments; ++s) {
      const Segment segment = work_.rows.segments[s];
      const int64_t b = segment.sequence;
      const int64_t* pending = state_.pending + b * per_sequence;
      const Choice choice = verify(s, segment);
      counts[b] = work_.grown[b] = choice.accepted + 1;
      if (state_.num_draft_tokens == 0) work_.skipped[b] += work_.grown[b];
      std::copy_n(pending + 1, choice.accepted, tokens + b * per_sequence);
      tokens[b * per_sequence + choice.accepted] = choice.token;
      work_.pending[b * per_sequence] = choice.token;
      // Overwrites segment s or an earlier one: a sequence confirms no more rows than it had.
      const int64_t row = work_.rows.n;
      work_.rows.add(b, state_.module_lengths()[b], choice.accepted + 1);
      for (int64_t i = 0; i <= choice.accepted; ++i) {
        work_.tokens[row + i] = tokens[b * per_sequence + i];
        work_.source[row + i] = segment.row + i;
      }
    }
  }

  // The first token after a prompt, in place of choose().
  void choose_first(int64_t sequence, int64_t n_prompt) {
    if (!check_finite(1, 1, work_.rows.n - 1)) return;
    std::copy_n(state_.pending, state_.batch * state_.rows_per_sequence(), work_.pending);
    for (int64_t b = 0; b < state_.batch; ++b) {
      work_.grown[b] = 0;
      work_.skipped[b] = state_.lengths[b] - state_.module_lengths()[b];
    }
    work_.grown[sequence] = n_prompt - state_.lengths[sequence];
    work_.skipped[sequence] = state_.num_draft_tokens > 0 ? 0 : n_prompt;
    work_.pending[sequence * state_.rows_per_sequence()] =
        token_of(0, model_.base.head.n, sequence, n_prompt, Stream::sample);
  }

  // The rows of the module's head: the last one of each sequence.
  void select_last_rows() {
    for (int64_t s = 0; s < work_.rows.n_segments; ++s)
      work_.source[s] = work_.rows.segments[s].row + work_.rows.segments[s].n_rows - 1;
  }

  // Draft token `draft` + 1 of each sequence from the module's head, and the module's next rows.
  void take_draft(int64_t draft) {
    for (int64_t s = 0; s < work_.rows.n_segments; ++s) {
      const Segment segment = work_.rows.segments[s];
      const int64_t module_position = segment.position + segment.n_rows - 1;
      // Draws and messages use the base model's positions.
      const int64_t position = module_position + work_.skipped[segment.sequence];
      if (work_.head.tokens[s] < 0) {
        work_.status = {StatusCode::nonfinite, segment.sequence, position};
        return;
      }
      const int64_t token =
          draft_token(token_of(s, model_.module.head.n, segment.sequence, position + 2, Stream::draft));
      work_.pending[segment.sequence * state_.rows_per_sequence() + draft + 1] = token;
      if (!state_.sampling.greedy() && verifies())
        std::copy_n(work_.head.probs_of(s), model_.module.head.n, draft_probs(segment.sequence, draft));
      // The next row takes the module's output at work.source[s] in place of a hidden state.
      work_.tokens[s] = token;
      work_.rows.segments[s] = {segment.sequence, module_position + 1, s, 1};
    }
    work_.rows.n = work_.rows.n_segments;
  }

  // Writes the new state.
  void commit() {
    std::copy_n(work_.pending, state_.batch * state_.rows_per_sequence(), state_.pending);
    for (int64_t b = 0; b < state_.batch; ++b) {
      state_.lengths[b] += work_.grown[b];
      state_.module_lengths()[b] = state_.lengths[b] - work_.skipped[b];
    }
  }

 private:
  // In alternate mode all draft tokens are accepted, so only the last row of a sequence needs the base model's head.
  bool verifies() const { return state_.mode == Mode::verify; }

  Choice verify(int64_t s, const Segment& segment) {
    const int64_t k = state_.num_draft_tokens;
    const int64_t sequence = segment.sequence;
    const int64_t last_position = segment.position + k + 1;
    const auto last = [&](int64_t row) {
      return Choice{k, token_of(row, model_.base.head.n, sequence, last_position, Stream::sample)};
    };
    if (!verifies()) return last(s);
    const int64_t first = s * (k + 1);
    if (state_.sampling.greedy())
      return verify_greedy(state_.pending + sequence * (k + 1), k,
                           [&](int64_t j) { return work_.head.tokens[first + j]; });
    for (int64_t j = 0; j < k; ++j) {
      const int64_t position = segment.position + j + 1;
      if (!accepts(first + j, sequence, j, position)) return {j, resample(first + j, sequence, j, position)};
    }
    return last(first + k);
  }

  bool accepts(int64_t row, int64_t sequence, int64_t draft, int64_t position) const {
    const int64_t token = state_.pending[sequence * state_.rows_per_sequence() + draft + 1];
    return accepts_draft(random(sequence, position, Stream::accept), work_.head.probs_of(row)[token],
                         draft_probs(sequence, draft)[draft_index(token)]);
  }

  int64_t resample(int64_t row, int64_t sequence, int64_t draft, int64_t position) {
    float* p = work_.head.probs_of(row);
    const float* q = draft_probs(sequence, draft);
    for (int64_t i = 0; i < model_.module.head.n; ++i) {
      float& probability = p[draft_token(i)];
      probability = residual(probability, q[i]);
    }
    return draw(p, model_.base.head.n, random(sequence, position, Stream::resample));
  }

  // Whether the logits of head rows [0, count) were finite; if not, sets the status. A sequence has
  // `rows_per_sequence` of these rows, and the first is its row `offset`.
  bool check_finite(int64_t count, int64_t rows_per_sequence, int64_t offset) {
    for (int64_t row = 0; row < count; ++row) {
      if (work_.head.tokens[row] >= 0) continue;
      const Segment& segment = work_.rows.segments[row / rows_per_sequence];
      work_.status = {StatusCode::nonfinite, segment.sequence, segment.position + offset + row % rows_per_sequence};
      return false;
    }
    return true;
  }

  // The token that a head over n tokens gives for `row`: its argmax, or a draw.
  int64_t token_of(int64_t row, int64_t n, int64_t sequence, int64_t position, Stream stream) const {
    if (state_.sampling.greedy()) return work_.head.tokens[row];
    return draw(work_.head.probs_of(row), n, random(sequence, position, stream));
  }

  float random(int64_t sequence, int64_t position, Stream stream) const {
    return uniform(static_cast<uint64_t>(state_.sampling.seeds[sequence]), static_cast<uint64_t>(position), stream);
  }

  float* draft_probs(int64_t sequence, int64_t draft) const {
    return state_.draft_probs + (sequence * state_.num_draft_tokens + draft) * model_.module.head.n;
  }

  int64_t draft_token(int64_t index) const {
    const int64_t* ids = model_.module.draft_vocab;
    return ids != nullptr ? ids[index] : index;
  }

  // The module drew `token`, so it is in the draft vocabulary, which ascends.
  int64_t draft_index(int64_t token) const {
    const int64_t* ids = model_.module.draft_vocab;
    return ids != nullptr ? std::lower_bound(ids, ids + model_.module.head.n, token) - ids : token;
  }

  const DecodeState& state_;
  const Model& model_;
  DecodeWork& work_;
};

}  // namespace recycle
