#include "control_groups.h"

#include <algorithm>
#include <fstream>

namespace recycle {

void for_each_control_group(const std::string& controller, const std::string& root,
                            const std::function<void(const std::string& folder)>& visit) {
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    // "4:cpu,cpuacct:/path" in version 1, "0::/path" in version 2.
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = line.substr(first, second - first);
    controllers += ':';
    const bool is_version_2 = controllers == "::";
    std::replace(controllers.begin(), controllers.end(), ',', ':');
    if (!is_version_2 && controllers.find(":" + controller + ":") == std::string::npos) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (is_version_2 ? "" : "/" + controller);
    // In a container the path may be the host's, and only the top is there.
    std::string path = line.substr(second + 1);
    while (true) {
      visit(mount + path);
      if (path.find('/') == std::string::npos) break;
      path.erase(path.rfind('/'));
    }
  }
}

}  // namespace recycle
