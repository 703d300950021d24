// Runs one launch of one kernel: `runner LAUNCH RESULT`. The build names the source and the kernel by KERNEL_FILE
// and KERNEL_NAME. A launch file holds, little-endian:
//
//   uint32 grid[3], block[3], shared bytes, order, late copies, seed, arguments
//   and per argument: uint32 kind (0 number, 1 buffer), uint32 bytes, the bytes
//
// The result is the bytes of all buffers, one behind the other. Each buffer ends at a page that cannot be touched
// (up to 15 bytes of alignment), or under AddressSanitizer where its memory does. Exits with 1 and a message.
#include KERNEL_FILE

#include <fstream>
#include <iterator>

namespace {

class Reader {
 public:
  explicit Reader(const char* path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }
  uint32_t number() {
    uint32_t value;
    memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  const char* take(size_t count) {
    if (at_ + count > bytes_.size()) {
      fprintf(stderr, "the launch file is too short\n");
      exit(2);
    }
    at_ += count;
    return bytes_.data() + at_ - count;
  }

 private:
  std::vector<char> bytes_;
  size_t at_ = 0;
};

char* guarded(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return static_cast<char*>(aligned_alloc(16, (bytes + 15) / 16 * 16));
#else
  constexpr size_t page = 4096;
  const size_t pages = (bytes + page - 1) / page * page;
  void* start = mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(static_cast<char*>(start) + pages, page, PROT_NONE);
  return static_cast<char*>(start) + pages - (bytes + 15) / 16 * 16;
#endif
}

struct Argument {
  bool is_buffer;
  size_t bytes;
  char* memory;  // of the number, or of the buffer
};

dim3 three(Reader& reader) {
  const uint32_t x = reader.number(), y = reader.number();
  return {x, y, reader.number()};
}

}  // namespace

int main(int, char** paths) {
  Reader reader(paths[1]);
  const dim3 grid = three(reader), block = three(reader);
  const size_t shared_bytes = reader.number();
  simulator::simulation().order = static_cast<simulator::Order>(reader.number());
  simulator::simulation().late_copies = reader.number();
  simulator::simulation().random = reader.number() + uint64_t{88172645463325252};
  std::vector<Argument> arguments(reader.number());
  std::vector<void*> pointers;
  for (Argument& argument : arguments) {
    argument.is_buffer = reader.number();
    argument.bytes = reader.number();
    argument.memory = argument.is_buffer ? guarded(argument.bytes) : static_cast<char*>(malloc(argument.bytes));
    memcpy(argument.memory, reader.take(argument.bytes), argument.bytes);
    pointers.push_back(argument.is_buffer ? static_cast<void*>(&argument.memory) : argument.memory);
  }
  const std::string error = simulator::launch_with(KERNEL_NAME, grid, block, shared_bytes, pointers);
  if (!error.empty()) {
    fprintf(stderr, "%s\n", error.c_str());
    return 1;
  }
  std::ofstream result(paths[2], std::ios::binary);
  for (const Argument& argument : arguments)
    if (argument.is_buffer) result.write(argument.memory, static_cast<std::streamsize>(argument.bytes));
  return 0;
}
