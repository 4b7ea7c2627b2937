#define RECYCLE_ISA generic
#include "lanes_generic.h"
#include "table.h"
