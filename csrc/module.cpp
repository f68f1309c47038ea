// Facts about this build and this machine, and the settings of the C library's malloc. The ops register with torch, not
// here.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"

#if defined(__linux__)
#include <sched.h>

#include <cerrno>
#endif

// Defined by any header of glibc.
#if defined(__GLIBC__)
#include <gnu/libc-version.h>
#include <link.h>
#include <malloc.h>
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = ALIGNFAST_VERSION;
  info["compiler"] = ALIGNFAST_COMPILER;
  info["compiler_version"] = ALIGNFAST_COMPILER_VERSION;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["build_type"] = ALIGNFAST_BUILD_TYPE;
  info["cmake"] = ALIGNFAST_CMAKE;
  info["architecture"] = ALIGNFAST_ARCHITECTURE;
  info["cuda_architectures"] = ALIGNFAST_CUDA_ARCHITECTURES;
  const std::string cuda_compiler = ALIGNFAST_CUDA_COMPILER;
  info["cuda_compiler"] = cuda_compiler.empty() ? py::object(py::none()) : py::object(py::str(cuda_compiler));
  return info;
}

// What this processor has and the operating system lets a process use, as /proc/cpuinfo spells it.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // A macro, because the builtin takes nothing but a string literal.
#define ALIGNFAST_FIND(feature, name) \
  if (__builtin_cpu_supports(feature)) found.emplace_back(name)
  ALIGNFAST_FIND("sse2", "sse2");
  ALIGNFAST_FIND("sse4.2", "sse4_2");
  ALIGNFAST_FIND("avx", "avx");
  ALIGNFAST_FIND("avx2", "avx2");
  ALIGNFAST_FIND("fma", "fma");
  ALIGNFAST_FIND("avx512f", "avx512f");
  ALIGNFAST_FIND("avx512bw", "avx512bw");
  ALIGNFAST_FIND("avx512dq", "avx512dq");
  ALIGNFAST_FIND("avx512vl", "avx512vl");
  ALIGNFAST_FIND("avx512bf16", "avx512_bf16");
#if !defined(__clang__)
  // Clang's builtin has known these for fewer releases than C++20.
  ALIGNFAST_FIND("f16c", "f16c");
  ALIGNFAST_FIND("avx512fp16", "avx512_fp16");
  ALIGNFAST_FIND("amx-tile", "amx_tile");
  ALIGNFAST_FIND("amx-bf16", "amx_bf16");
#endif
#undef ALIGNFAST_FIND
#elif defined(__aarch64__)
  // Part of the base architecture.
  found.emplace_back("neon");
#endif
  return found;
}

// Hardware threads this process may run on: the affinity mask counts, the size of the machine does not.
int thread_count() {
#if defined(__linux__)
  // A mask smaller than the kernel's is refused with EINVAL.
  for (int cpus = CPU_SETSIZE; cpus <= (1 << 20); cpus *= 2) {
    std::vector<unsigned char> mask(CPU_ALLOC_SIZE(cpus));
    auto* set = reinterpret_cast<cpu_set_t*>(mask.data());
    if (sched_getaffinity(0, mask.size(), set) == 0) return CPU_COUNT_S(mask.size(), set);
    if (errno != EINVAL) break;
  }
#endif
  const unsigned threads = std::thread::hardware_concurrency();
  return threads == 0 ? 1 : static_cast<int>(threads);
}

// The file that a symbol comes from in this process and the address it was loaded to; nothing where that is unknown.
Dl_info origin(const char* symbol) {
  Dl_info found{};
  void* address = dlsym(RTLD_DEFAULT, symbol);
  if (address == nullptr || dladdr(address, &found) == 0) return {};
  return found;
}

#if defined(__GLIBC__)
// Whether a symbol's address leads to an entry of the executable from which calls go on to a library. One at a fixed
// address, such as Debian's Python, has such entries.
bool is_entry(const char* symbol) {
  Dl_info found{};
  ElfW(Sym)* entry = nullptr;
  void* address = dlsym(RTLD_DEFAULT, symbol);
  void** extra = reinterpret_cast<void**>(&entry);
  return address != nullptr && dladdr1(address, &found, extra, RTLD_DL_SYMENT) != 0 && entry != nullptr &&
         entry->st_shndx == SHN_UNDEF;
}

// The first of the loaded libraries that has malloc of its own, in the order in which calls find it.
Dl_info malloc_library() {
  const link_map* map = nullptr;
  void* self = dlopen(nullptr, RTLD_LAZY);
  if (self == nullptr || dlinfo(self, RTLD_DI_LINKMAP, &map) != 0) return {};
  for (map = map->l_next; map != nullptr; map = map->l_next) {
    void* library = dlopen(map->l_name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    Dl_info found{};
    void* address = dlsym(library, "malloc");
    const bool known = address != nullptr && dladdr(address, &found) != 0;
    dlclose(library);
    if (known && reinterpret_cast<uintptr_t>(found.dli_fbase) == map->l_addr) return found;
  }
  return {};
}
#endif

// glibc with its version, or the file that serves malloc in its place, such as that of a preloaded jemalloc.
std::string allocator() {
  Dl_info serving = origin("malloc");
#if defined(__GLIBC__)
  if (is_entry("malloc")) serving = malloc_library();
  if (serving.dli_fbase == origin("gnu_get_libc_version").dli_fbase) {
    return std::string("glibc ") + gnu_get_libc_version();
  }
#endif
  return serving.dli_fname == nullptr ? "unknown" : std::filesystem::path(serving.dli_fname).filename().string();
}

// Whether glibc's malloc keeps large blocks after they were freed; false where it is another C library's or refuses.
bool keep_freed_memory([[maybe_unused]] bool keep) {
#if defined(__GLIBC__)
  // A block with a mapping of its own is unmapped when it is freed. M_MMAP_THRESHOLD would do the same for blocks of
  // any size, but older releases refuse it more than 32 MiB. -1 stands for no trimming at all.
  if (keep) return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
  // A call of mallopt ends glibc's own adjustment of both thresholds for good. These are where it stops in a process
  // that frees large blocks.
  const bool restored = mallopt(M_MMAP_MAX, 65536) == 1 && mallopt(M_MMAP_THRESHOLD, 32 << 20) == 1 &&
                        mallopt(M_TRIM_THRESHOLD, 64 << 20) == 1;
  malloc_trim(0);
  return restored;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information, instruction sets, thread count, and the C library's malloc.";
  module.def("build_info", &build_info, "What this binary was built from and with.");
  module.def("instruction_sets", &instruction_sets, "Instruction sets that are usable on this processor.");
  module.def(
      "cpu_isa", [] { return alignfast::isa_name(alignfast::isa()); },
      "The instruction set whose kernels serve; ALIGNFAST_CPU_ISA names one of usable_cpu_isas() to force it.");
  module.def("usable_cpu_isas", &alignfast::usable_isas, "Instruction sets with kernels that run on this processor.");
  module.def("thread_count", &thread_count, "Hardware threads that this process may use.");
  module.def("allocator", &allocator, "What serves malloc: glibc and its version, or the name of a file.");
  module.def("keep_freed_memory", &keep_freed_memory,
             "Have glibc's malloc keep freed blocks of any size, or hand back what it has and large ones to come.");
}
