// How wide the vectors are that the library was made for, in floats.
#include "common.h"

extern "C" void infermesh_width(int32_t* out) { *out = infermesh::kWidth; }
