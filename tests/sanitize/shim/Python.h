// As much of Python as csrc/cpu/ops_cpu.cpp names, for a program without an interpreter. Nothing of it is called.
#pragma once

struct PyObject {};
struct PyMethodDef {
  const char* name;
  PyObject* (*call)(PyObject*, PyObject*);
  int flags;
  const char* doc;
};
struct PyModuleDef {
  int base;
  const char *name, *doc;
  long size;
  PyMethodDef* methods;
  void *slots, *traverse, *clear, *release;
};

#define PyModuleDef_HEAD_INIT 0
#define METH_VARARGS 1
#define METH_NOARGS 4
#define Py_RETURN_NONE return nullptr
#define PyMODINIT_FUNC PyObject*

template <class... Arguments>
int PyArg_ParseTuple(PyObject*, const char*, Arguments...) {
  return 0;
}
inline PyObject* PyLong_FromLongLong(long long) { return nullptr; }
inline PyObject* PyModule_Create(PyModuleDef*) { return nullptr; }
inline PyObject* PyCapsule_New(void*, const char*, void*) { return nullptr; }
inline int PyModule_AddObject(PyObject*, const char*, PyObject*) { return 0; }
inline int PyModule_AddStringConstant(PyObject*, const char*, const char*) { return 0; }
