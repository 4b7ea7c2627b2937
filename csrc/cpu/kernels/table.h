// Included once by each kernels_<isa>.cpp, after its lanes: compiles the kernels for that set. Everything
// but the table is in an unnamed namespace: code built with an instruction set's flags must not be
// shared by the linker with code that has to run without it.
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../kernels.h"
#include "gemm.h"

// attention.h uses exp() of elementwise.h, hence the blank line that keeps the order
#include "elementwise.h"

#include "attention.h"

#define RECYCLE_NAME_OF(isa) #isa
#define RECYCLE_NAME(isa) RECYCLE_NAME_OF(isa)

namespace recycle::RECYCLE_ISA {

extern const Kernels kTable;
const Kernels kTable = {RECYCLE_NAME(RECYCLE_ISA),
                        product,
                        quantise,
                        rms_norm,
                        swiglu,
                        attend,
                        merge_splits,
                        argmax,
                        read_stream,
                        max_value,
                        exp_sum};

}  // namespace recycle::RECYCLE_ISA
