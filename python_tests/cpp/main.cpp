// Runs the tests of the program, or those named on the command line, and prints their names.
#include <algorithm>
#include <string>

#include "check.h"

int main(int argc, char** argv) {
  const std::vector<std::string> names(argv + 1, argv + argc);
  int runs = 0;
  for (const test::Test& one : test::all()) {
    if (!names.empty() && std::find(names.begin(), names.end(), one.name) == names.end()) continue;
    one.run();
    std::printf("%s\n", one.name);
    std::fflush(stdout);
    ++runs;
  }
  return runs > 0 ? 0 : 1;
}
