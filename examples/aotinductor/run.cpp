// Runs a model that AOTInductor compiled, in a process without Python:
//
//     run model.pt2 inputs.pt outputs.pt [libfxquant_torch.so [calls]]
//
// inputs.pt: a list of tensors, written by torch.save; outputs.pt: a tuple of them, for torch.load.
// The library has the operators of programs that were exported without standard=True ("" opens none).
// With a number of calls, the median time of one is printed.
// README.md says how to make the model and how to compile this program.

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

std::vector<char> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("cannot write " + path);
}

// Opening the library registers its operators with torch.
void open_operators(const std::string& path) {
  if (path.empty()) return;
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
}

template <class Work>
double median_milliseconds(int calls, Work work) {
  std::vector<double> times;
  for (int i = 0; i < calls; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    times.push_back(time.count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc > 6) {
    std::cerr << "usage: run model.pt2 inputs.pt outputs.pt [libfxquant_torch.so [calls]]\n";
    return 2;
  }
  try {
    if (argc > 4) open_operators(argv[4]);
    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const c10::IValue stored = torch::jit::pickle_load(bytes_of(argv[2]));
    std::vector<at::Tensor> inputs;
    for (const c10::IValue& value : stored.toListRef()) inputs.push_back(value.toTensor());
    std::vector<c10::IValue> outputs;
    for (const at::Tensor& tensor : model.run(inputs)) outputs.emplace_back(tensor);
    write(argv[3], torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(outputs))));
    if (const int calls = argc > 5 ? std::stoi(argv[5]) : 0; calls > 0) {
      std::cout << median_milliseconds(calls, [&] { model.run(inputs); }) << " ms a call\n";
    }
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
