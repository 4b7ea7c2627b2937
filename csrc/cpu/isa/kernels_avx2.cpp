#define RECYCLE_ISA avx2
#include "lanes_avx2.h"
#include "table.h"
