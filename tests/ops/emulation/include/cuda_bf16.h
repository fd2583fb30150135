// Stands in for CUDA's header: storage and the two conversions.
#pragma once
#include <stdint.h>
#include <string.h>
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits += 0x7fff + (bits >> 16 & 1);  // round to nearest even
  return {uint16_t(bits >> 16)};
}
