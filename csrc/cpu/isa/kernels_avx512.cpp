#define RECYCLE_ISA avx512
#include "lanes_avx512.h"
#include "table.h"
