#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#define PLANMOE_ZFP_X86 1
#endif

namespace planmoe::zfp {
namespace {

// The compiler's checks cover the operating system's saving of the wide registers as well.
bool detect_avx2() noexcept {
#ifdef PLANMOE_ZFP_X86
  constexpr unsigned kF16c = 1u << 29;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __builtin_cpu_init();  // this may run before the compiler's own constructors
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kF16c) != 0;
#else
  return false;
#endif
}

bool detect_avx512() noexcept {
#ifdef PLANMOE_ZFP_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

// Asked once: identifying the processor is slow under a hypervisor.
bool processor_has_avx2() noexcept {
  static const bool has = detect_avx2();
  return has;
}

bool processor_has_avx512() noexcept {
  static const bool has = detect_avx512();
  return has;
}

}  // namespace

const KernelSet* find_kernels(Kernel kernel) noexcept {
  switch (kernel) {
    case Kernel::kScalar:
      return scalar_kernels();
    case Kernel::kAvx2:
      return processor_has_avx2() ? avx2_kernels() : nullptr;
    case Kernel::kAvx512:
      return processor_has_avx512() ? avx512_kernels() : nullptr;
    case Kernel::kAutomatic:
      break;
  }
  return find_kernels(best_kernel());
}

bool kernel_available(Kernel kernel) noexcept { return find_kernels(kernel) != nullptr; }

Kernel best_kernel() noexcept {
  if (kernel_available(Kernel::kAvx512)) return Kernel::kAvx512;
  if (kernel_available(Kernel::kAvx2)) return Kernel::kAvx2;
  return Kernel::kScalar;
}

}  // namespace planmoe::zfp
