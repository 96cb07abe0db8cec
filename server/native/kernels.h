// All kernels of one instruction set. No include guards: this is included once for each of them.

#include "vectors.h"

#include "product_kernels.h"

#include "attention_kernels.h"
#include "int8_kernels.h"
#include "layer_kernels.h"
#include "slot_kernels.h"
