// Stands in for CUDA's header: storage and the two conversions.
#pragma once
struct __half {
  _Float16 number;
};
inline float __half2float(__half x) { return float(x.number); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
