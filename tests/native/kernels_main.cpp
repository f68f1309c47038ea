// Runs every kernel of one instruction set (-DAF_ISA=...) on fixed inputs, without torch, and prints a hash of what it
// gives. Processors and compilers are compared by this text, hence no input that leads to NaN, whose bits differ.

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/philox_uniform.h"
#include "cpu/sign_step.h"

namespace {

using namespace alignfast;

constexpr Dtype DTYPES[] = {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16};

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return "float64";
    case Dtype::float32:
      return "float32";
    case Dtype::bfloat16:
      return "bfloat16";
    case Dtype::float16:
      break;
  }
  return "float16";
}

class Hash {
 public:
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) {
      value_ = (value_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
    }
  }
  void add(double x) { add(&x, sizeof(x)); }
  void print(const std::string& what) const { std::printf("%s %016llx\n", what.c_str(), value_); }

 private:
  unsigned long long value_ = 0xcbf29ce484222325u;
};

// Values of any dtype in [low, high), some of them made tiny and some zero.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t count, double low, double high, uint32_t seed) : dtype_(dtype) {
    const PhiloxStream stream = philox_stream(seed, 0, 0, 0, 0);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t words[4];
      philox_block(stream, static_cast<uint32_t>(i), words);
      double value = low + static_cast<double>(unit_of(words[0])) * (high - low);
      if (words[1] % 8 == 0) value *= 0x1p-22;
      if (words[1] % 8 == 1) value = 0;
      append(value);
    }
  }

  void* data() { return bytes_.data(); }
  void add_to(Hash& hash) const { hash.add(bytes_.data(), bytes_.size()); }

 private:
  void append(double value) {
    switch (dtype_) {
      case Dtype::float64:
        return store(value);
      case Dtype::float32:
        return store(static_cast<float>(value));
      case Dtype::bfloat16:
        return store(narrow<BFloat16>(static_cast<float>(value)));
      case Dtype::float16:
        return store(narrow<Half>(static_cast<float>(value)));
    }
  }

  template <class T>
  void store(T value) {
    bytes_.resize(bytes_.size() + sizeof(T));
    std::memcpy(bytes_.data() + bytes_.size() - sizeof(T), &value, sizeof(T));
  }

  Dtype dtype_;
  std::vector<unsigned char> bytes_;
};

struct Shape {
  const char* name;
  ImageLayout layout;
  // Elements of the image, and of the memory it lies in.
  int64_t elements, extent;
};

constexpr Shape SHAPES[] = {
    {"pixel", {{1, 1, 1}, {1, 1, 1}, true}, 1, 1},
    {"odd", {{3, 7, 5}, {35, 5, 1}, true}, 105, 105},
    {"long", {{3, 31, 47}, {1457, 47, 1}, true}, 4371, 4371},
    {"strided", {{3, 31, 47}, {1, 282, 6}, false}, 4371, 8742},
};

void run_sign_step(Dtype dtype, const Shape& shape, bool moving) {
  Buffer adv(dtype, shape.extent, 0, 1, 1), image(dtype, shape.extent, 0, 1, 2);
  Buffer grad(dtype, shape.extent, -0.02, 0.02, 3), momentum(dtype, shape.extent, -1, 1, 4);
  const SignStepImage step{dtype,        adv.data(),   image.data(), grad.data(), moving ? momentum.data() : nullptr,
                           shape.layout, shape.layout, shape.layout, shape.layout};
  const SignStepConfig config{0.03, 0.11, 0.9, 0.0, 1.0};
  const int64_t begin = shape.elements / 3, end = shape.elements;
  Hash hash;
  hash.add(AF_ISA::sign_step_l1(step, begin, end));
  AF_ISA::sign_step_linf(step, config, 0.0123, begin, end);
  const double largest = AF_ISA::sign_step_direction(step, config, 0.0123, begin, end);
  hash.add(largest);
  const double length = AF_ISA::sign_step_length(step, largest, begin, end);
  hash.add(length);
  hash.add(AF_ISA::sign_step_l2_move(step, config, largest, length, begin, end));
  AF_ISA::sign_step_l2_project(step, config, 0.37, begin, end);
  adv.add_to(hash);
  momentum.add_to(hash);
  hash.print(std::string("sign_step ") + name_of(dtype) + " " + shape.name + (moving ? " momentum" : ""));
}

void run_philox_uniform() {
  const PhiloxStream stream = philox_stream(0xa4093822299f31d0u, 0xfffffffeu, 7, 65537, 3);
  for (const int64_t count : {1, 3, 128, 1001}) {
    for (const int64_t first : {int64_t{0}, int64_t{13}, (int64_t{1} << 34) - 2048}) {
      std::vector<float> draws(static_cast<size_t>(count));
      AF_ISA::philox_uniform(stream, first, count, -0.3f, 0.7f, draws.data());
      Hash hash;
      hash.add(draws.data(), draws.size() * sizeof(float));
      hash.print("philox_uniform " + std::to_string(first) + " " + std::to_string(count));
    }
  }
}

}  // namespace

int main() {
  for (const Dtype dtype : DTYPES) {
    for (const Shape& shape : SHAPES) {
      for (const bool moving : {false, true}) run_sign_step(dtype, shape, moving);
    }
  }
  run_philox_uniform();
}
