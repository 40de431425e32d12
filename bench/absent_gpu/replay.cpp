// Replay allocations and frees with torch's caching allocator, and print the most bytes that were allocated and reserved.
// Each line of the file has the number of an allocation and its bytes, or 0 when it is freed.
#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdio>
#include <unordered_map>

int main(int, char** arguments) {
  using namespace c10::cuda::CUDACachingAllocator;
  init(1);
  std::FILE* file = std::fopen(arguments[1], "r");
  std::unordered_map<long long, void*> used;
  for (long long number, size; std::fscanf(file, "%lld %lld", &number, &size) == 2;) {
    if (size > 0) {
      used[number] = raw_alloc(size);
    } else if (const auto found = used.find(number); found != used.end()) {
      raw_delete(found->second);
      used.erase(found);
    }
  }
  const auto stats = getDeviceStats(0);
  std::printf("%lld %lld\n", static_cast<long long>(stats.allocated_bytes[0].peak),
              static_cast<long long>(stats.reserved_bytes[0].peak));
}
