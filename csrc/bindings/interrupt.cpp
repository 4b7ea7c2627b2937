#include "interrupt.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace recycle::bindings {

namespace {

// What the handler raised (KeyboardInterrupt), on its way through torch's dispatcher. torch's bindings call set_error()
// for this base class, as pybind11 does of any version; they know no other way for an exception of Python's.
class Interrupt : public py::builtin_exception {
 public:
  Interrupt() : builtin_exception("interrupted by a signal") {}
  void set_error() const override;
};

thread_local PyObject *raised_type, *raised_value, *raised_traceback;

void Interrupt::set_error() const {
  PyErr_Restore(raised_type, raised_value, raised_traceback);
  raised_type = raised_value = raised_traceback = nullptr;
}

}  // namespace

bool interrupted() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  PyErr_Fetch(&raised_type, &raised_value, &raised_traceback);
  return true;
}

void throw_interrupt() { throw Interrupt(); }

}  // namespace recycle::bindings
