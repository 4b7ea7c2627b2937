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

  // Any thread may call this.
  int64_t n_head_rows() const { return verifies() ? work_.rows.n : work_.rows.n_segments; }

  // The base model's rows: the pending tokens of all sequences that are not idle and have room.
  void begin_step() {
    const int64_t per_sequence = state_.rows_per_sequence();
    work_.rows.clear();
    for (int64_t b = 0; b < state_.batch; ++b) {
      const int64_t* pending = state_.pending + b * per_sequence;
      std::copy_n(pending, per_sequence, work_.pending + b * per_sequence);
      work_.grown[b] = 0;
      work_.skipped[b] = state_.lengths[b] - state_.module_lengths()[b];
      if (pending[0] < 0) continue;
      if (state_.lengths[b] > capacity() - positions_needed(state_.num_draft_tokens)) {
        work_.grown[b] = kNoRoom;
        continue;
      }
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
  void choose() {
    const int64_t per_sequence = state_.rows_per_sequence();
    const int64_t head_rows = verifies() ? per_sequence : 1;  // of a sequence
    const int64_t n_segments = work_.rows.n_segments;
    work_.rows.clear();
    for (int64_t s = 0; s < n_segments; ++s) {
      const Segment segment = work_.rows.segments[s];
      const int64_t b = segment.sequence;
      if (!are_finite(s * head_rows, head_rows)) {
        work_.grown[b] = kNotFinite;
        continue;
      }
      const int64_t* pending = state_.pending + b * per_sequence;
      const Choice choice = verify(s, segment);
      work_.grown[b] = choice.accepted + 1;
      if (state_.num_draft_tokens == 0) work_.skipped[b] += work_.grown[b];
      work_.pending[b * per_sequence] = choice.token;
      // Overwrites segment s or an earlier one: a sequence confirms no more rows than it had.
      const int64_t row = work_.rows.n;
      work_.rows.add(b, state_.module_lengths()[b], choice.accepted + 1);
      for (int64_t i = 0; i <= choice.accepted; ++i) {
        work_.tokens[row + i] = i < choice.accepted ? pending[i + 1] : choice.token;
        work_.source[row + i] = segment.row + i;
      }
    }
  }

  // The first token after a prompt, in place of choose().
  void choose_first(int64_t sequence, int64_t n_prompt) {
    std::fill_n(work_.grown, state_.batch, 0);
    if (!are_finite(0, 1)) {
      work_.grown[sequence] = kNotFinite;
      work_.rows.clear();
      return;
    }
    work_.grown[sequence] = n_prompt;
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
    const int64_t n_segments = work_.rows.n_segments;
    work_.rows.clear();
    for (int64_t s = 0; s < n_segments; ++s) {
      const Segment segment = work_.rows.segments[s];
      const int64_t b = segment.sequence;
      if (!are_finite(s, 1)) {
        work_.grown[b] = kNotFinite;
        continue;
      }
      const int64_t module_position = segment.position + segment.n_rows - 1;
      const int64_t position = module_position + work_.skipped[b];  // draws use the base model's positions
      const int64_t token = draft_token(token_of(s, model_.module.head.n, b, position + 2, Stream::draft));
      work_.pending[b * state_.rows_per_sequence() + draft + 1] = token;
      if (has_draft_probs()) std::copy_n(work_.head.probs_of(s), model_.module.head.n, new_draft_probs(b, draft));
      // The next row takes the module's output at this source in place of a hidden state. Overwrites segment s or an
      // earlier one.
      const int64_t row = work_.rows.n;
      work_.tokens[row] = token;
      work_.source[row] = work_.source[s];
      work_.rows.add(b, module_position + 1, 1);
    }
  }

  // Writes the results, and the new state of the sequences that grow. tokens and counts: null in a prefill.
  void commit(int64_t* tokens, int64_t* counts) {
    const int64_t per_sequence = state_.rows_per_sequence();
    for (int64_t b = 0; b < state_.batch; ++b) {
      int64_t* pending = state_.pending + b * per_sequence;
      const int64_t* new_pending = work_.pending + b * per_sequence;
      const int64_t grown = work_.grown[b];
      if (tokens != nullptr) {
        int64_t* row = tokens + b * per_sequence;
        std::fill_n(row, per_sequence, int64_t{-1});
        if (grown > 0) *std::copy_n(pending + 1, grown - 1, row) = new_pending[0];
        counts[b] = grown;
      }
      if (grown <= 0) continue;
      std::copy_n(new_pending, per_sequence, pending);
      state_.lengths[b] += grown;
      state_.module_lengths()[b] = state_.lengths[b] - work_.skipped[b];
      for (int64_t draft = 0; has_draft_probs() && draft < state_.num_draft_tokens; ++draft)
        std::copy_n(new_draft_probs(b, draft), model_.module.head.n, draft_probs(b, draft));
    }
  }

 private:
  // In alternate mode all draft tokens are accepted, so only the last row of a sequence needs the base model's head.
  bool verifies() const { return state_.mode == Mode::verify; }
  bool has_draft_probs() const { return verifies() && !state_.sampling.greedy(); }

  int64_t capacity() const {
    return state_.num_draft_tokens > 0 ? std::min(state_.base_cache.capacity, state_.module_cache.capacity)
                                       : state_.base_cache.capacity;
  }

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
                         draft_prob(sequence, draft, token));
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

  // Whether the logits of head rows [first, first + count) were finite.
  bool are_finite(int64_t first, int64_t count) const {
    const int64_t* tokens = work_.head.tokens + first;
    return std::all_of(tokens, tokens + count, [](int64_t token) { return token >= 0; });
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

  // The same until commit(): rows of the head's scratch that the module's head, with a row for each sequence, leaves free.
  float* new_draft_probs(int64_t sequence, int64_t draft) const {
    return work_.head.probs_of(state_.batch + sequence * state_.num_draft_tokens + draft);
  }

  int64_t draft_token(int64_t index) const {
    const int64_t* ids = model_.module.draft_vocab;
    return ids != nullptr ? ids[index] : index;
  }

  // The probability that pending draft token `token` was drawn with: 0 outside of the draft vocabulary, which ascends.
  float draft_prob(int64_t sequence, int64_t draft, int64_t token) const {
    const float* probs = draft_probs(sequence, draft);
    const int64_t* ids = model_.module.draft_vocab;
    if (ids == nullptr) return probs[token];
    const int64_t* end = ids + model_.module.head.n;
    const int64_t* found = std::lower_bound(ids, end, token);
    return found != end && *found == token ? probs[found - ids] : 0.0f;
  }

  const DecodeState& state_;
  const Model& model_;
  DecodeWork& work_;
};

}  // namespace recycle
