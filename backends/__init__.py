"""What each array library needs beyond the array API standard.

One module a library; each has one class, ``Adapter``, made from the library's array API
namespace.  `generic` states the contract and fulfils it with the standard alone; the others
override what their library does better.  Nothing in this folder imports chunkattn: the
algorithm is handed to the adapter as functions.
"""
