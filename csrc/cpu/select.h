// What rank 0 decides between the passes of a decode step: the base model's rows, what counts of the draft tokens,
// the module's rows, the new draft tokens, the new state. Its GPU counterpart is csrc/cuda/select.cu.
#pragma once

#include <cstdint>

#include "decode_work.h"
#include "recycle/choice.h"
#include "recycle/decode_step.h"
#include "recycle/random.h"

namespace recycle {

class Selector {
 public:
  Selector(const DecodeState& state, DecodeWork& work)
      : state_(state), model_(*state.model), work_(work) {}

  // Any thread may call these two.
  bool failed() const { return work_.status.code != StatusCode::ok; }
  int64_t n_head_rows() const { return verifies() ? work_.rows.n : work_.rows.n_segments; }

  // The base model's rows: the pending tokens of all sequences that are not idle.
  void begin_step(int64_t* tokens, int64_t* counts);
  // The rows of the base model's head.
  void select_head_rows();
  // How far each sequence grows, and the rows that the module reads.
  void choose(int64_t* tokens, int64_t* counts);
  // The first token after a prompt, in place of choose().
  void choose_first(int64_t sequence, int64_t n_prompt);
  // The rows of the module's head: the last one of each sequence.
  void select_last_rows();
  // Draft token `draft` + 1 of each sequence from the module's head, and the module's next rows.
  void take_draft(int64_t draft);
  // Writes the new state.
  void commit();

 private:
  // In alternate mode all draft tokens count, so only the last row of a sequence needs the base model's head.
  bool verifies() const { return state_.mode == Mode::verify; }
  bool check_finite(int64_t count, int64_t rows_per_sequence, int64_t offset);
  Choice verify(int64_t s, const Segment& segment);
  bool accepts(int64_t row, int64_t sequence, int64_t draft, int64_t position) const;
  int64_t resample(int64_t row, int64_t sequence, int64_t draft, int64_t position);
  int64_t token_of(int64_t row, int64_t n, int64_t sequence, int64_t position, Stream stream) const;
  float random(int64_t sequence, int64_t position, Stream stream) const;
  float* draft_probs(int64_t sequence, int64_t draft) const;
  int64_t draft_token(int64_t index) const;
  int64_t draft_index(int64_t token) const;

  const DecodeState& state_;
  const Model& model_;
  DecodeWork& work_;
};

}  // namespace recycle
