// Where the time of a step goes: for each phase, what each thread worked and what it waited at the
// barrier that ends the phase. Off, it costs one test a barrier; on, two readings of the clock.
#pragma once

#include <cstdint>

namespace recycle {

// A phase is what happens between two barriers; it is named at the barrier that ends it.
enum class Phase : int32_t {
  lead,       // thread 0 decides; embeddings, RoPE's angles
  qkv,        // norm, q, k and v, RoPE, append
  attention,  // scores and weighted values
  output,     // merge of the splits, o
  gate_up,    // norm, gate, up, SwiGLU
  down,       // down
  input,      // the module's input product
  head,       // output matrix and running maximum
  pick,       // maximum over the threads, or sampling
};
inline constexpr int kPhases = 9;
const char* phase_name(Phase phase);

struct PhaseTime {
  double work = 0;  // seconds, the average thread's
  double wait = 0;
  int64_t count = 0;  // times the phase was run
};

// Starts over with empty sums, or stops. Not while a step runs.
void profile(bool on);
// What was added up since profile(true). is_module: of the module's layers, else of the rest.
PhaseTime phase_time(Phase phase, bool is_module);

}  // namespace recycle
