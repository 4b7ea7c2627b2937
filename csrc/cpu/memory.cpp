#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <utility>

#include "control_groups.h"

namespace recycle {

namespace {

// The numbers of a file with lines "name number" or "name: number kB".
std::map<std::string, int64_t> named_numbers(const std::string& file) {
  std::map<std::string, int64_t> numbers;
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    const size_t end = line.find_first_of(": ");
    if (end != std::string::npos) numbers[line.substr(0, end)] = std::atoll(line.c_str() + end + 1);
  }
  return numbers;
}

// The number in a file of one; `otherwise` where there is no file, or no number ("max": no limit).
int64_t number(const std::string& file, int64_t otherwise) {
  int64_t value;
  return std::ifstream(file) >> value ? value : otherwise;
}

// What one control group leaves.
int64_t available_in(const std::string& folder) {
  constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  // Names of version 2, then of version 1.
  const std::pair<const char*, const char*> names[] = {{"/memory.max", "/memory.current"},
                                                       {"/memory.limit_in_bytes", "/memory.usage_in_bytes"}};
  for (const auto& [limit_name, usage_name] : names) {
    const int64_t limit = number(folder + limit_name, kNoLimit);
    if (limit == kNoLimit) continue;
    auto numbers = named_numbers(folder + "/memory.stat");
    const std::string prefix = numbers.count("total_active_file") > 0 ? "total_" : "";
    const int64_t cache = numbers[prefix + "active_file"] + numbers[prefix + "inactive_file"];
    return std::max<int64_t>(0, limit - number(folder + usage_name, 0) + cache);
  }
  return kNoLimit;
}

}  // namespace

int64_t available_memory(const std::string& root) {
  auto machine = named_numbers(root + "/proc/meminfo");
  if (machine.count("MemAvailable") == 0) return -1;
  int64_t available = machine["MemAvailable"] * 1024;
  for_each_control_group("memory", root,
                         [&](const std::string& folder) { available = std::min(available, available_in(folder)); });
  return available;
}

}  // namespace recycle
