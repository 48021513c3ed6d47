// The same plain loops compiled for several instruction sets, the widest that the processor has taken at run time. No
// torch here: the fuzz test compiles these headers alone.
#pragma once

#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#define PLANMOE_X86 1
#endif

#define PLANMOE_INLINE __attribute__((always_inline))

namespace planmoe {

enum class Vectors : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Asked once: identifying the processor is slow under a hypervisor.
inline Vectors widest_vectors() {
#ifdef PLANMOE_X86
  static const Vectors widest = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Vectors::kAvx512;
    return __builtin_cpu_supports("avx2") ? Vectors::kAvx2 : Vectors::kPortable;
  }();
  return widest;
#else
  return Vectors::kPortable;
#endif
}

// Floats per vector register, as a type: what a body below is given.
template <int count>
using Lanes = std::integral_constant<int, count>;

#ifdef PLANMOE_X86
// No fma: a product that is rounded before it is added gives the same bytes everywhere.
template <class Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void run_avx512(
    const Body& body) {
  body(Lanes<16>{});
}

template <class Body>
__attribute__((target("avx2"))) void run_avx2(const Body& body) {
  body(Lanes<8>{});
}
#endif

// body(Lanes<...>) with the instructions of `vectors`. The body is a lambda marked PLANMOE_INLINE, and so is all it
// calls: only what is inlined gets those instructions.
template <class Body>
PLANMOE_INLINE inline void with_vectors(Vectors vectors, const Body& body) {
#ifdef PLANMOE_X86
  if (vectors == Vectors::kAvx512) return run_avx512(body);
  if (vectors == Vectors::kAvx2) return run_avx2(body);
#endif
  body(Lanes<4>{});
}

}  // namespace planmoe
